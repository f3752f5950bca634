"""A bar chart of results and the published results of GPT-2's sizes."""

import math
from pathlib import Path
from typing import Any

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from evaluation.results.metric_values import MetricValue
from evaluation.results.references import SIZES, one_per_size, published
from evaluation.results.report import number
from evaluation.results.results_file import Results

_COLUMNS = 3
_LOG_SCALE_FROM = 20  # times the smallest bar, which would be invisible


def plot_results(path: Path, results: Results) -> None:
    """Write a .png, .svg or .pdf with a panel for each metric: the model with its 95 % interval, then GPT-2."""
    from matplotlib.figure import Figure

    metrics = [(result.task, name, metric) for result in results.tasks for name, metric in result.metrics.items()]
    panels = [panel for panel in metrics if math.isfinite(panel[2].value)]
    if not panels:
        raise InputError("no metric has a finite value to plot; omit --plot")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.0 + 3.6 * columns, 0.8 + 2.9 * rows), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, *panel)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    limited = f" (first {results.limit:,} items)" if results.limit else ""
    name = "/".join(Path(results.model).parts[-2:])  # a Hub id, or the end of a path
    figure.suptitle(f"{name}{limited}, and OpenAI's GPT-2 where published under the same protocol")
    write_atomically(path, lambda stream: figure.savefig(stream, format=path.suffix.removeprefix(".")))


def _draw(axes: Any, task: str, name: str, metric: MetricValue) -> None:
    references = one_per_size(published(task, name))
    sizes = [size for size in SIZES if size in references]
    labels = ["this model", *(f"GPT-2\n{size}" for size in sizes)]
    values = [metric.value, *(references[size].value for size in sizes)]
    tops = list(values)
    axes.bar(labels, values, color=["tab:blue", *["tab:gray"] * len(sizes)], width=0.7)
    if metric.interval is not None:
        low, high = metric.interval
        high = high if math.isfinite(high) else metric.value
        below, above = max(0.0, metric.value - low), max(0.0, high - metric.value)
        axes.errorbar([0], [metric.value], yerr=[[below], [above]], color="black", capsize=4)
        tops[0] = high
    if metric.module != "accuracy" and max(tops) > _LOG_SCALE_FROM * min(values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 3, max(tops) * 3)
    else:
        axes.margins(y=0.15)
    for position, (value, top) in enumerate(zip(values, tops, strict=True)):
        axes.annotate(
            number(value), (position, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
        )
    direction = "higher is better" if metric.module == "accuracy" else "lower is better"
    axes.set_title(f"{task}\n{name} ({direction})", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.2)
    axes.set_axisbelow(True)
