"""What learning.py prints and draws: final losses over seeds, paired differences, and the steps to a loss."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.monitoring.plots import smoothed

# 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT = dict(enumerate([12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262], start=1))


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        loss: final validation loss, nats per token.
        seconds_per_step: median over the logged steps.
        tokens_per_step: the same for all steps.
        tokens, losses: training loss of the logged steps.
    """

    loss: float
    seconds_per_step: float
    tokens_per_step: int
    tokens: list[int]
    losses: list[float]


Results = dict[str, dict[int, dict[int, Result]]]  # by recipe, number of steps and seed


def mean_loss(results: dict[int, Result]) -> float:
    """The mean final loss over the seeds."""
    return statistics.mean(result.loss for result in results.values())


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The mean of paired differences and half the width of its 95 % interval; infinite for a single pair."""
    degrees = len(differences) - 1
    if degrees == 0:
        return differences[0], math.inf
    quantile = STUDENT.get(degrees, 2.228)  # of 10; that of more is smaller
    return statistics.mean(differences), quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def steps_to_reach(loss: float, curve: dict[int, float]) -> float | None:
    """The number of steps at which `curve` (steps → final loss) reaches a loss.

    Linear in the logarithm of the steps between two runs. None if no run reaches it; the shortest run's steps if that
    already does.
    """
    points = sorted(curve.items())
    if points[0][1] <= loss:
        return points[0][0]
    for (left, above), (right, below) in itertools.pairwise(points):
        if below <= loss:
            share = (above - loss) / (above - below)
            return math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
    return None


def report(results: Results) -> list[str]:
    """The lines that compare all recipes with the first."""
    baseline, *others = results
    end, base = max(results[baseline].items())
    lines = [
        "",
        "| recipe | steps | seeds | validation loss | deviation | s/step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, by_steps in results.items():
        for steps, seeds in sorted(by_steps.items()):
            losses = [result.loss for result in seeds.values()]
            spread = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "–"
            lines.append(
                f"| {name} | {steps} | {len(losses)} | {mean_loss(seeds):.4f} | {spread} | {seconds(seeds):.3f} |"
            )
    lines.append("")
    for name in others:
        for steps, runs in sorted(results[name].items()):
            mean, half = interval([runs[seed].loss - base[seed].loss for seed in runs])
            verdict = "significant" if abs(mean) > half else "not significant"
            few = "(one seed)" if len(runs) == 1 else "(two seeds)"
            precision = f"± {half:.4f}, {verdict} (95 %, paired)" if len(runs) > 2 else few
            lines.append(f"{name} in {steps} steps − {baseline} in {end}: {mean:+.4f} {precision}")
        reached = steps_to_reach(mean_loss(base), {steps: mean_loss(runs) for steps, runs in results[name].items()})
        if reached is None:
            lines.append(f"{name} does not reach the final loss of {baseline}")
            continue
        at_most = "at most " if reached == min(results[name]) else ""
        cost = seconds(max(results[name].items())[1]) / seconds(base)
        lines.append(
            f"{name} reaches the final loss of {baseline} in {at_most}{reached:.0f} steps: {reached / end:.2f} of the "
            f"steps, {reached * cost / end:.2f} of the time"
        )
    return lines


def seconds(runs: dict[int, Result]) -> float:
    """Median seconds of a step over the seeds."""
    return statistics.median(result.seconds_per_step for result in runs.values())


def draw(results: Results, path: Path) -> None:
    """Draw the loss against tokens and against time: training as curves, final validation as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ends = []
    for index, (name, by_steps) in enumerate(results.items()):
        color = f"C{index % 10}"
        for steps, runs in by_steps.items():
            first = next(iter(runs.values()))
            pace, last = seconds(runs) / first.tokens_per_step, steps * first.tokens_per_step
            mean = [statistics.mean(values) for values in zip(*(run.losses for run in runs.values()), strict=True)]
            ends += [mean_loss(runs), min(mean), mean[len(mean) // 4]]
            for axes, scale in ((left, 1.0), (right, pace)):
                at = [scale * tokens for tokens in first.tokens]
                axes.plot(at, smoothed(mean, max(1, len(mean) // 30)), color=color, alpha=0.4, linewidth=1)
                label = f"{name} ({mean_loss(runs):.3f})" if steps == max(by_steps) else None
                axes.plot(scale * last, mean_loss(runs), "o", color=color, markersize=5, label=label)
    margin = 0.05 * (max(ends) - min(ends)) or 0.1
    left.set(xlabel="tokens", ylabel="loss (nats per token)", ylim=(min(ends) - margin, max(ends) + margin))
    right.set(xlabel="seconds of training steps")
    for axes in (left, right):
        axes.grid(alpha=0.2)
    left.legend(title="validation")
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
