"""Which recipe learns most: several recipes over the same data and seeds, against the first one.

    python benchmarks/learning.py adamw muon [--baseline_steps 600] [--steps 180 240] [--seeds 1 2 3]

A recipe is a YAML file with max_steps, or a built-in one: `classic` (AdamW as GPT-2 recipes have it), `adamw` (tuned),
`muon`, or `nanogpt` (the settings of `classic` in nanoGPT's own loop, from the checkout --nanogpt). The first is the
baseline, which runs for --baseline_steps. The others run for every number of --steps, with warmup and decay shortened
in proportion, so each run completes its own schedule. The benchmark prints

- the final validation loss per number of steps: mean and standard deviation over the seeds, and the steps' seconds;
- the difference from the baseline's final loss, paired by seed, with its 95 % interval (Student's t);
- the steps and the time at which a recipe reaches the baseline's final loss, interpolated between its runs.

Every run is a run folder under --output. When stopped, the benchmark saves a checkpoint (nanoGPT's loop does not, and
starts over); the same command continues and skips finished runs. `learning.png` there shows loss against tokens and
against time.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli_errors import CommandParser, InputError, interrupt_on_sigterm, run_command
from training.monitoring.plots import smoothed
from training.monitoring.run_history import read_metrics
from training.recipe import QUICKSTART, Recipe, load_recipe

NANOGPT = "nanogpt"
PROXY = {"n_embd": 128, "max_steps": 600, "min_learning_rate_ratio": 0, "attn_implementation": "sdpa"}
PROXY |= {
    "lr_scheduler_type": "cosine",
    "mixed_precision": "no",
    "logging_steps": 10,
    "save_steps": 0,
    "eval_steps": 0,
    "sample_steps": 0,
    "seq_len_warmup_steps": 0,
    "document_mask": False,
}
BUILT_IN: dict[str, dict[str, Any]] = {
    "classic": {"learning_rate": 6e-4, "adam_beta2": 0.95, "warmup_steps": 60, "min_learning_rate_ratio": 0.1},
    "adamw": {
        "learning_rate": 6e-3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "max_grad_norm": 0.25,
        "warmup_steps": 300,
        "lr_scheduler_type": "linear",
        "seq_len_warmup_steps": 300,
    },
    "muon": {
        "optimizer": "muon",
        "learning_rate": 0.02,
        "embedding_learning_rate": 0.04,
        "norm_learning_rate": 4e-3,
        "muon_momentum": 0.9,
        "muon_momentum_warmup_steps": 0,
        "seq_len_warmup_steps": 300,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "warmup_steps": 12,
        "lr_scheduler_type": "linear",
    },
}
BUILT_IN[NANOGPT] = BUILT_IN["classic"]
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


def named_recipe(name: str, overrides: dict[str, Any]) -> Recipe:
    """A built-in recipe or one from a file, with its length in steps."""
    if name in BUILT_IN:
        recipe = load_recipe(QUICKSTART, {**PROXY, "optimizer": "adamw", **BUILT_IN[name], **overrides})
    elif Path(name).suffix in (".yaml", ".yml"):
        recipe = load_recipe(Path(name), overrides)
    else:
        raise InputError(f"{name} is neither a YAML file nor one of {', '.join(BUILT_IN)}")
    if recipe.max_steps is None:
        raise InputError(f"{name} has no max_steps, of which warmup and decay are a part; give it a length in steps")
    return recipe


def shard_settings(data_dir: str) -> dict[str, Any]:
    """The keys of a recipe that a shard folder decides; an empty folder is filled from the recipe's corpus."""
    from training.data.shards.shard_reader import ShardFolder

    folder = ShardFolder.find(Path(data_dir))
    settings: dict[str, Any] = {"data_dir": data_dir}
    if folder is None:
        return settings
    if folder.manifest is None:  # another program's shards, which do not say how they were made
        return settings | {"tokenizer": "gpt2"}
    names = ("corpus", "corpus_config", "text_field", "document_separator", "encoding", "split_special_tokens")
    made_of = {name: getattr(folder.manifest, name) for name in (*names, "shard_tokens", "val_tokens")}
    return settings | made_of | {"tokenizer": data_dir}


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe for another number of steps, with all warmups and the decay in proportion."""
    assert recipe.max_steps is not None
    share = steps / recipe.max_steps
    names = ("warmup_steps", "decay_steps", "muon_momentum_warmup_steps", "seq_len_warmup_steps")
    lengths = {name: getattr(recipe, name) for name in names}
    scaled: dict[str, Any] = {name: length and max(1, round(share * length)) for name, length in lengths.items()}
    return dataclasses.replace(recipe, max_steps=steps, **scaled)


def result_of(folder: Path, steps: int) -> Result | None:
    """The result of a run of so many steps, if it is finished."""
    lines = read_metrics(folder)
    ends = [line["val_loss"] for line in lines if line["step"] == steps and "val_loss" in line]
    logged = [line for line in lines if line.get("tokens_per_second")]
    if not ends or not logged:
        return None
    tokens_per_step = logged[0]["tokens"] // logged[0]["step"]
    seconds = [tokens_per_step / line["tokens_per_second"] for line in logged]
    return Result(
        loss=ends[-1],
        seconds_per_step=statistics.median(seconds),
        tokens_per_step=tokens_per_step,
        tokens=[line["tokens"] for line in logged],
        losses=[line["train_loss"] for line in logged],
    )


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise an `InputError` if the folder holds a run of another recipe, of which results must not be taken."""
    if not (folder / "recipe.yaml").exists():
        return
    earlier = dataclasses.replace(load_recipe(folder / "recipe.yaml"), output_dir=recipe.output_dir).to_dict()
    changed = [f"{key}: {earlier[key]} → {now}" for key, now in recipe.to_dict().items() if earlier[key] != now]
    if changed:
        raise InputError(
            f"{folder} holds a run of another recipe ({'; '.join(changed)}); remove it, or choose another --output"
        )


def run_all(
    recipes: dict[str, Recipe],
    lengths: dict[str, list[int]],
    seeds: Sequence[int],
    output: Path,
    checkout: Path | None,
) -> Results:
    """Train what is not finished yet, seed by seed, for each recipe's numbers of steps; return all results."""
    from nanogpt_loop import train_with_nanogpt

    from training.loop import train

    results: Results = {name: {} for name in recipes}
    for seed in seeds:
        for name, recipe in recipes.items():
            for steps in lengths[name]:
                folder = output / name / f"{steps}-steps" / f"seed-{seed}"
                run = dataclasses.replace(shortened(recipe, steps), seed=seed, output_dir=str(folder))
                check_same_recipe(folder, run)
                if result_of(folder, steps) is None and name == NANOGPT:
                    assert checkout is not None
                    train_with_nanogpt(run, checkout)
                elif result_of(folder, steps) is None:
                    with contextlib.redirect_stdout(io.StringIO()):
                        train(run)
                result = result_of(folder, steps)
                assert result is not None
                print(f"{name}, {steps} steps, seed {seed}: {result.loss:.4f}", flush=True)
                results[name].setdefault(steps, {})[seed] = result
    return results


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


def main() -> None:
    """Train, print the comparison, and draw it."""
    assert __doc__ is not None
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML file or built-in recipe; first the baseline")
    parser.add_argument("--baseline_steps", type=int, default=600, help="length of the baseline (default: 600 steps)")
    parser.add_argument("--steps", type=int, nargs="+", default=[180, 240], help="lengths of the others")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"), help="folder of all runs")
    parser.add_argument("--data_dir", help="shard folder of all recipes, with its tokenizer (default: each one's)")
    parser.add_argument(
        "--nanogpt",
        type=Path,
        metavar="CHECKOUT",
        help="checkout of nanoGPT, for the recipe nanogpt; the shards must exist",
    )
    arguments = parser.parse_args()
    overrides = {} if arguments.data_dir is None else shard_settings(arguments.data_dir)
    recipes = {Path(name).stem: named_recipe(name, overrides) for name in arguments.recipes}
    if len(recipes) < len(arguments.recipes):
        raise InputError("two recipes have the same name; rename a file")
    if (NANOGPT in arguments.recipes) != (arguments.nanogpt is not None):
        raise InputError("the recipe nanogpt and --nanogpt CHECKOUT need each other; give both or none")
    if NANOGPT in recipes and NANOGPT not in arguments.recipes:
        raise InputError(f"a file cannot be named {NANOGPT}, which is a built-in recipe; rename it")
    interrupt_on_sigterm()  # an exception makes `subprocess` end nanoGPT's process too
    steps, seeds = sorted(set(arguments.steps)), sorted(set(arguments.seeds))
    for flag, shortest in (("--steps", steps[0]), ("--baseline_steps", arguments.baseline_steps)):
        if shortest < 1:
            raise InputError(f"{flag}: expected at least 1, found {shortest}")
    baseline, *others = recipes
    lengths = {baseline: [arguments.baseline_steps], **dict.fromkeys(others, steps)}
    results = run_all(recipes, lengths, seeds, arguments.output, arguments.nanogpt)
    print("\n".join(report(results)))
    picture = arguments.output / "learning.png"
    draw(results, picture)
    print(f"\n{picture}")


if __name__ == "__main__":
    run_command(main)
