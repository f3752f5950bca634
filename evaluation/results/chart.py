"""A bar chart of results beside the published figures of GPT-2's sizes."""

import math
from pathlib import Path
from typing import Any

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from evaluation.results.metric_values import Measured
from evaluation.results.references import SIZES, one_per_size, published
from evaluation.results.report import number
from evaluation.results.results_file import Results

_COLUMNS = 3
_LOG_SCALE_FROM = 20  # times the smallest bar: beyond, it could not be seen


def plot_results(path: Path, results: Results) -> None:
    """Draw a panel for each figure, the model's bar with its 95 % interval first, and write it whole or not at all.

    Args:
        path: .png, .svg or .pdf.
        results: of a model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (result.task, name, measured)
        for result in results.tasks
        for name, measured in result.figures.items()
        if math.isfinite(measured.value)
    ]
    if not panels:
        raise InputError("expected a figure that can be drawn, found none; leave out --plot")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.0 + 3.6 * columns, 0.8 + 2.9 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, *panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    limited = f" (first {results.limit:,} items)" if results.limit else ""
    figure.suptitle(f"{_short(results.model)}{limited}, beside OpenAI's GPT-2 where published under the same protocol")
    canvas = FigureCanvasAgg(figure)
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda stream: canvas.figure.savefig(stream, format=kind))


def _draw(axes: Any, task: str, name: str, measured: Measured) -> None:
    references = one_per_size(published(task, name))
    sizes = [size for size in SIZES if size in references]
    labels = ["this model", *(f"GPT-2\n{size}" for size in sizes)]
    values = [measured.value, *(references[size].value for size in sizes)]
    tops = list(values)
    axes.bar(labels, values, color=["tab:blue", *["tab:gray"] * len(sizes)], width=0.7)
    if measured.interval is not None:
        low, high = measured.interval
        high = high if math.isfinite(high) else measured.value
        below, above = max(0.0, measured.value - low), max(0.0, high - measured.value)
        axes.errorbar([0], [measured.value], yerr=[[below], [above]], color="black", capsize=4)
        tops[0] = high
    if measured.metric != "accuracy" and max(tops) > _LOG_SCALE_FROM * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 3, max(tops) * 3)
    else:
        axes.margins(y=0.15)
    for place, (value, top) in enumerate(zip(values, tops, strict=True)):
        axes.annotate(
            number(value), (place, top), xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8
        )
    direction = "higher is better" if measured.metric == "accuracy" else "lower is better"
    axes.set_title(f"{task}\n{name} ({direction})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.2)
    axes.set_axisbelow(True)


def _short(model: str) -> str:
    """Return a Hub id, or the last two parts of a path."""
    return "/".join(Path(model).parts[-2:])
