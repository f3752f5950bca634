"""curves.png: what a run learnt against the tokens it saw, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from evaluation.references import VALIDATION_LOSS
from training.atomic import write_whole
from training.progress import Smoothed

_SMOOTHED_POINTS = 30  # that the curve of the training loss keeps apart; more show noise, fewer lag behind


def smoothed(values: list[float], weight: float) -> list[float]:
    """The exponential moving average after each value."""
    average = Smoothed(weight)
    return [average.add(value) for value in values]


def plot_curves(path: Path, metrics: list[dict[str, Any]], *, title: str, corpus: str, gpt2_tokens: bool) -> None:
    """Draw training and validation loss against tokens, and write the picture whole or not at all.

    Arguments:
        path: the PNG to write.
        metrics: lines of metrics.jsonl.
        title: heading of the picture.
        corpus: GPT-2's own loss is drawn where it was published for this corpus …
        gpt2_tokens: … and the run uses GPT-2's tokenizer, without which losses per token cannot be compared.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    training = [line for line in metrics if "train_loss" in line]
    validation = [line for line in metrics if "val_loss" in line]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if training:
        tokens, losses = [line["tokens"] for line in training], [line["train_loss"] for line in training]
        axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(
            tokens, smoothed(losses, max(0.0, 1.0 - _SMOOTHED_POINTS / len(losses))), color="tab:blue", label="training"
        )
    if validation:
        axes.plot(
            [line["tokens"] for line in validation],
            [line["val_loss"] for line in validation],
            color="tab:orange",
            marker="o",
            markersize=3,
            label=f"validation ({validation[-1]['val_loss']:.3f})",
        )
    for reference in VALIDATION_LOSS.get(corpus, ()) if gpt2_tokens else ():
        axes.axhline(reference.value, color="tab:gray", linestyle="--", linewidth=1)
        axes.annotate(
            f"OpenAI GPT-2 {reference.size}: {reference.value:.3f}",
            (1, reference.value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="tab:gray",
        )
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.2)
    if training or validation:
        axes.legend(loc="upper right")
    write_whole(path, FigureCanvasAgg(figure).print_png)
