"""What each optimization of a training step is worth on this machine, from plain fp32 to what the kit does.

    python benchmarks/ladder.py [--geometry 6x384] [--rounds 5] [--output ladder.png]

Each rung adds one thing to the rung before it. All rungs take turns in one process, on random tokens; the table and
the bar chart show medians. Rungs that the hardware does not have are skipped. docs/ladder.md explains the rungs.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from step_timing import Geometry, Step, machine, ours, ours_with_logits
from train_step import GEOMETRIES

from gpt2_scratch import blockwise_attention
from training.recipe import QUICKSTART, load_recipe
from training.setup.accelerator import resolve_mixed_precision


@dataclasses.dataclass(frozen=True)
class Rung:
    """The settings of a step."""

    name: str
    tf32: bool = False
    bf16: bool = False
    compiled: bool = False
    attention: str = "eager"
    padded: bool = False
    fused: bool = False
    chunked: bool = False

    def step(self, geometry: Geometry, device: str) -> Step:
        """The step of this rung."""
        if self.padded:
            geometry = dataclasses.replace(geometry, vocab_size=-(-geometry.vocab_size // 64) * 64)
        build = ours if self.chunked else ours_with_logits
        side = build(geometry, device, self.attention)
        if self.compiled:
            side = side.compiled()
        return Step(side, geometry, device, bf16=self.bf16, fused=self.fused)

    def seconds(self, step: Step) -> float:
        """Seconds of a step."""
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        return step.seconds()


def rungs(device: str, bf16: bool) -> Iterator[Rung]:
    """The rungs that this hardware has; the chunked loss pads the vocabulary itself where that helps."""
    rung = Rung("fp32")
    yield rung
    for name, change, available in (
        ("TF32", {"tf32": True}, device == "cuda"),
        ("bf16", {"bf16": True}, bf16),
        ("torch.compile", {"compiled": True}, True),
        ("fused attention", {"attention": "sdpa"}, True),
        ("padded vocabulary", {"padded": True}, True),
        ("fused AdamW", {"fused": True}, True),
        ("chunked loss", {"chunked": True, "padded": False}, True),
        ("blockwise attention", {"attention": blockwise_attention.NAME}, bf16 and device == "cpu"),
    ):
        if available:
            rung = dataclasses.replace(rung, name=f"+ {name}", **change)  # type: ignore[arg-type]
            yield rung


def main() -> None:
    """Print the table and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="6x384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("ladder.png"), help="bar chart to write")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    geometry = GEOMETRIES[arguments.geometry]
    climbed = list(rungs(device, resolve_mixed_precision(load_recipe(QUICKSTART)) == "bf16"))
    steps = [rung.step(geometry, device) for rung in climbed]
    for rung, step in zip(climbed, steps, strict=True):  # compile, allocate optimizer state
        rung.seconds(step)
        rung.seconds(step)
    gc.collect()
    times: list[list[float]] = [[] for _ in climbed]
    for _ in range(arguments.rounds):
        for rung, step, each in zip(climbed, steps, times, strict=True):
            each.append(rung.seconds(step))
    medians = [1e3 * statistics.median(each) for each in times]
    title = f"{arguments.geometry}, {geometry.batch_size} × {geometry.seq_len} tokens, {machine(device)}"
    print(f"{title}; medians of {arguments.rounds} rounds\n\n| rung | ms | against fp32 | against the rung before |")
    print("| --- | --- | --- | --- |")
    for rung, before, median in zip(climbed, [medians[0], *medians], medians, strict=False):
        print(f"| {rung.name} | {median:.0f} | {medians[0] / median:.2f}× | {before / median:.2f}× |")
    draw(arguments.output, [rung.name for rung in climbed], medians, title)


def draw(path: Path, names: list[str], milliseconds: list[float], title: str) -> None:
    """Write the bar chart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.45 * len(names) + 1.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(names[::-1], milliseconds[::-1], color="C0")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("ms per step")
    axes.set_title(title, fontsize=8)
    axes.margins(x=0.1)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
