"""Plots of runs against training tokens, drawn from their metrics.jsonl.

A run redraws its own plot after every validation, in a separate process: importing matplotlib takes seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from evaluation.results.references import VALIDATION_LOSS, Reference, one_per_size, published
from training.monitoring.run_history import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTHED_SHARE = 1 / 150  # of the training-loss curve is averaged into a point, on either side
_FEWEST_FOR_A_LINE = 40  # fewer points get markers: a line through a single point is invisible
_BEGINNING = 0.03  # share of a run whose high losses may be outside the plot


@dataclass(frozen=True)
class Curves:
    """The curves of a run.

    GPT-2's own loss is drawn if it was published for the corpus, and if the run uses GPT-2's tokenizer, because losses
    per token are not comparable otherwise.
    """

    name: str  # of the run folder
    metrics: list[dict[str, Any]]  # the lines of its metrics.jsonl
    corpus: str = ""
    gpt2_tokens: bool = False

    @classmethod
    def of(cls, folder: Path) -> "Curves":
        """Return the curves of the run in a folder; a folder without a run is an `InputError`."""
        if not (folder / "recipe.yaml").is_file():
            raise InputError(
                f"{folder} is not a run folder: it has no recipe.yaml; pass a folder such as runs/quickstart"
            )
        try:
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
            corpus, tokenizer = str(recipe.get("corpus")), recipe.get("tokenizer")
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            raise InputError(f"{folder / 'recipe.yaml'} is not a readable recipe") from None
        name = folder.name or folder.resolve().name
        return cls(name, read_metrics(folder), corpus, tokenizer == "gpt2")

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """Return tokens and values of all lines with this key."""
        lines = [line for line in self.metrics if key in line and "tokens" in line]
        return [line["tokens"] for line in lines], [line[key] for line in lines]


def smoothed(values: Sequence[float], half_width: int) -> list[float]:
    """Return the mean of each value and `half_width` neighbors on either side.

    Unlike an average of the past, it does not lag behind a falling loss. Near the start, where the loss falls most, the
    window is narrower but still symmetric. Non-finite values are skipped; a window without finite values gives NaN.
    """
    losses = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, losses, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(losses))
    reach = np.minimum(half_width, index)
    first, end = index - reach, np.minimum(index + reach + 1, len(losses))
    with np.errstate(invalid="ignore"):
        return ((sums[end] - sums[first]) / (counts[end] - counts[first])).tolist()


def loss_limits(columns: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float] | None:
    """Return the lowest and highest loss to show, or None to show all, by tokens and training losses of each run.

    The first steps of a run start at ten nats or more. Showing them would squeeze the rest into a line at the bottom. A
    loss that is high later on is always shown.
    """
    points = [point for tokens, losses in columns for point in zip(tokens, losses, strict=True)]
    beginning = _BEGINNING * max((tokens for tokens, _ in points), default=0.0)
    shown = [loss for tokens, loss in points if tokens >= beginning and math.isfinite(loss)]
    if len(points) < _FEWEST_FOR_A_LINE or not shown:
        return None
    margin = 0.05 * (max(shown) - min(shown)) or 0.1
    return min(shown) - margin, max(shown) + margin


def plot_curves(path: Path, runs: Sequence[Curves]) -> None:
    """Plot one run, or several in the same axes, and write the file atomically.

    The panels are training and validation loss, learning rate, gradient norm before clipping, and HellaSwag accuracy if
    it was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    has_tasks = any(run.column("hellaswag_acc_norm")[0] for run in runs)
    side_titles = ["learning rate", "gradient norm", *(["HellaSwag accuracy"] if has_tasks else [])]
    figure = Figure(figsize=(11, 5.5), dpi=110, layout="constrained")
    panels = figure.subplot_mosaic([["", title] for title in side_titles], width_ratios=(1.8, 1))
    loss, norm = panels[""], panels["gradient norm"]
    _draw_losses(loss, runs)
    _draw_small(panels["learning rate"], runs, "learning_rate")
    _draw_small(norm, runs, "grad_norm")
    norms = [value for run in runs for value in run.column("grad_norm")[1] if math.isfinite(value)]
    if norms and min(norms) > 0:
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        norm.yaxis.set_minor_formatter(NullFormatter())
    if has_tasks:
        _draw_hellaswag(panels["HellaSwag accuracy"], runs)
    loss.set(ylabel="loss (nats per token)", xlabel="tokens", title=runs[0].name if len(runs) == 1 else "")
    end = max((line.get("tokens", 0) for run in runs for line in run.metrics), default=0)
    for title, axes in panels.items():
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.2)
        if end:
            axes.set_xlim(0, 1.02 * end)
        else:
            axes.set(xticks=[], yticks=[])
        if title:
            axes.set_title(title, fontsize=9)
            axes.tick_params(labelsize=8)
    panels[side_titles[-1]].set_xlabel("tokens", fontsize=9)
    write_atomically(path, FigureCanvasAgg(figure).print_png)


def _draw_losses(axes: "Axes", runs: Sequence[Curves]) -> None:
    alone = len(runs) == 1
    non_finite: list[float] = []
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        tokens, losses = run.column("train_loss")
        non_finite += [at for at, loss in zip(tokens, losses, strict=True) if not math.isfinite(loss)]
        if losses:
            if alone:
                axes.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8, marker=_marker(losses), markersize=3)
            curve = smoothed(losses, round(_SMOOTHED_SHARE * len(losses)))
            label = "training" if alone else None if run.column("val_loss")[0] else f"{run.name} (training)"
            axes.plot(tokens, curve, color=color, alpha=1.0 if alone else 0.5, linewidth=1.2, label=label)
        tokens, losses = run.column("val_loss")
        if losses:
            axes.plot(
                tokens,
                losses,
                color="C1" if alone else color,
                marker="o",
                markersize=3,
                label=f"{'validation' if alone else run.name} ({losses[-1]:.3f})",
            )
    if non_finite:  # the curve has only a gap there
        axes.plot(
            non_finite,
            [0.02] * len(non_finite),
            "x",
            color="tab:red",
            transform=axes.get_xaxis_transform(),
            label=f"loss not finite ({len(non_finite)} logged step{'s' if len(non_finite) > 1 else ''})",
        )
    comparable = all(run.gpt2_tokens and run.corpus == runs[0].corpus for run in runs)
    references = VALIDATION_LOSS.get(runs[0].corpus, ()) if comparable else ()
    for reference in references:
        _draw_reference(axes, reference, above=False)
    limits = loss_limits([run.column("train_loss") for run in runs])
    if limits is not None:
        axes.set_ylim(min([limits[0], *(reference.value - 0.1 for reference in references)]), limits[1])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right" if limits is not None else "best", title=None if alone else "validation")
    elif not any(run.metrics for run in runs):
        axes.text(0.5, 0.5, "no metrics yet", ha="center", color="tab:gray", transform=axes.transAxes)


def _draw_small(axes: "Axes", runs: Sequence[Curves], key: str) -> None:
    for index, run in enumerate(runs):
        tokens, values = run.column(key)
        axes.plot(tokens, values, color=f"C{index % 10}", linewidth=1, marker=_marker(values), markersize=3)


def _draw_hellaswag(axes: "Axes", runs: Sequence[Curves]) -> None:
    """Draw accuracies, and GPT-2's sizes up to the first that is better."""
    best = 0.0
    for index, run in enumerate(runs):
        tokens, values = run.column("hellaswag_acc_norm")
        best = max([best, *(value for value in values if math.isfinite(value))])
        axes.plot(tokens, values, color="C1" if len(runs) == 1 else f"C{index % 10}", marker="o", markersize=3)
    for reference in one_per_size(published("hellaswag:completion", "acc_norm")).values():
        _draw_reference(axes, reference, above=True)
        if reference.value > best:
            break
    axes.margins(y=0.2)


def _draw_reference(axes: "Axes", reference: Reference, *, above: bool) -> None:
    """Draw a line at a published value, with its label on the left."""
    axes.axhline(reference.value, color="tab:gray", linestyle="--", linewidth=1)
    axes.annotate(
        f"OpenAI GPT-2 {reference.size}: {reference.value:.4g}",
        (0.01, reference.value),
        xycoords=("axes fraction", "data"),
        ha="left",
        va="bottom" if above else "top",
        fontsize=7 if above else 8,
        color="tab:gray",
    )


def _marker(values: Sequence[float]) -> str | None:
    return "o" if len(values) < _FEWEST_FOR_A_LINE else None
