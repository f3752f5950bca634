"""Which recipe learns most: several recipes over the same data and seeds, against the first one.

    python benchmarks/learning.py adamw muon [--size proxy] [--baseline_steps 600] [--steps 180 240] [--seeds 1 2 3]

A recipe is a YAML file with max_steps, or a built-in one: `classic` (AdamW as GPT-2 recipes have it), `adamw` (tuned),
`muon`, or `nanogpt` (the settings of `classic` in nanoGPT's own loop, from the checkout --nanogpt). --size is the model
of built-in recipes: the proxy of docs/recipes.md, the quickstart's, or GPT-2's for a GPU, on the shards in --data_dir.
The first recipe is the baseline, which runs for --baseline_steps. The others run for every number of --steps, with
warmup and decay shortened in proportion, so each run completes its own schedule. The benchmark prints

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
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from learning_report import Result, Results, draw, report

from common.cli_errors import CommandParser, InputError, interrupt_on_sigterm, run_command
from training.monitoring.run_history import read_metrics
from training.recipe import QUICKSTART, Recipe, load_recipe

NANOGPT = "nanogpt"
COMMON = {
    "max_steps": 600,
    "min_learning_rate_ratio": 0,
    "attn_implementation": "sdpa",
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_steps": 0,
    "eval_steps": 0,
    "sample_steps": 0,
    "seq_len_warmup_steps": 0,
    "document_mask": False,
}
SIZES: dict[str, dict[str, Any]] = {
    "proxy": {"n_embd": 128, "mixed_precision": "no"},
    "quickstart": {"n_embd": 256},
    "124m": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "seq_len": 1024,
        "tokens_per_step": 131_072,
        "per_device_train_batch_size": 32,
        "compile": True,
    },
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
        "warmup_steps": 12,
        "lr_scheduler_type": "linear",
    },
}
BUILT_IN[NANOGPT] = BUILT_IN["classic"]
# The keys whose best value falls as 1 / n_embd (docs/recipes.md). BUILT_IN was tuned on the proxy only.
BY_WIDTH = {"adamw": "learning_rate", "muon": "embedding_learning_rate"}


def named_recipe(name: str, overrides: dict[str, Any], size: str = "proxy") -> Recipe:
    """A built-in recipe for a model of a size, or a recipe from a file, with its length in steps."""
    if name in BUILT_IN:
        built_in = {**COMMON, **SIZES[size], "optimizer": "adamw", **BUILT_IN[name]}
        if (key := BY_WIDTH.get(name)) is not None:
            built_in[key] *= SIZES["proxy"]["n_embd"] / SIZES[size]["n_embd"]
        recipe = load_recipe(QUICKSTART, {**built_in, **overrides})
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
    from training.data.shards.shard_spec import RECORDED

    folder = ShardFolder.find(Path(data_dir))
    settings: dict[str, Any] = {"data_dir": data_dir}
    if folder is None:
        return settings
    if folder.manifest is None:  # another program's shards, which do not say how they were made
        return settings | {"tokenizer": "gpt2"}
    made_of = {name: getattr(folder.manifest, name) for name in ("corpus", *RECORDED)}
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
    from accelerate.state import AcceleratorState
    from nanogpt_loop import train_with_nanogpt

    from training.loop import train

    results: Results = {name: {} for name in recipes}
    for seed in seeds:
        for name, recipe in recipes.items():
            for steps in lengths[name]:
                folder = output / name / f"{steps}-steps" / f"seed-{seed}"
                run = dataclasses.replace(shortened(recipe, steps), seed=seed, output_dir=str(folder))
                check_same_recipe(folder, run)
                AcceleratorState._reset_state()  # accelerate refuses another precision than the first recipe's
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


def main() -> None:
    """Train, print the comparison, and draw it."""
    assert __doc__ is not None
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="YAML file or built-in recipe; first the baseline")
    parser.add_argument(
        "--size", choices=list(SIZES), default="proxy", help="model of built-in recipes (default: proxy)"
    )
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
    recipes = {Path(name).stem: named_recipe(name, overrides, arguments.size) for name in arguments.recipes}
    if len(recipes) < len(arguments.recipes):
        raise InputError("two recipes have the same name; rename a file")
    if (NANOGPT in arguments.recipes) != (arguments.nanogpt is not None):
        raise InputError("the recipe nanogpt and --nanogpt CHECKOUT need each other; give both or none")
    if NANOGPT in recipes and NANOGPT not in arguments.recipes:
        raise InputError(f"a file cannot be named {NANOGPT}, which is a built-in recipe; rename it")
    if arguments.size == "124m" and "tokenizer" not in overrides:
        raise InputError("--size 124m needs --data_dir: shards with GPT-2's vocabulary, from training.prepare")
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
