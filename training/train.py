"""accelerate launch training/train.py [--config training/recipes/NAME.yaml] [--field value …] [--preflight]

Trains a GPT-2 from a recipe, by default the quickstart recipe. Every recipe key is a flag. --preflight checks the
setup and reports memory and time without training, and cost with --price_per_gpu_hour. With --gpu a100 --gpus 8, it
does so for GPUs that are not here.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Python puts training/ first; with the project's root there instead, no file here can shadow a library's module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.cli_errors import CommandParser, InputError, did_you_mean, run_command
from training.recipe import QUICKSTART, Recipe, field_types, load_recipe

_PREFLIGHT_FLAGS = ("gpu", "gpus", "mfu", "price_per_gpu_hour")


class Command(NamedTuple):
    """The parsed command line."""

    recipe: Recipe
    preflight: bool
    flags: dict[str, Any]  # of the preflight that were given


def build_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each recipe key. Values stay strings, which `load_recipe` converts."""
    parser = CommandParser(prog="training/train.py", description="Train a GPT-2 from a recipe.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="recipe as YAML (default: the quickstart)")
    parser.add_argument("--preflight", action="store_true", help="report memory, time and cost, and exit")
    parser.add_argument("--gpu", help="with --preflight: GPUs that are not here, such as a100; nothing is measured")
    parser.add_argument("--gpus", type=int, help="with --gpu: their number (default: 1)")
    parser.add_argument("--mfu", type=float, help="with --gpu: assumed share of their peak FLOP/s (default: 0.4)")
    parser.add_argument("--price_per_gpu_hour", type=float, help="price of a GPU hour, for the cost in --preflight")
    kinds = field_types()
    for key in dataclasses.fields(Recipe):
        several = "list" in str(kinds[key.name])
        parser.add_argument(
            f"--{key.name}", nargs="*" if several else None, default=argparse.SUPPRESS, help=key.metadata["help"]
        )
    return parser


def parse_command(arguments: Sequence[str]) -> Command:
    """The parsed command line; an unknown flag is an `InputError`."""
    known, unknown = build_parser().parse_known_args(arguments)
    overrides = vars(known)
    config, preflight = (overrides.pop(name) for name in ("config", "preflight"))
    given = {name: value for name in _PREFLIGHT_FLAGS if (value := overrides.pop(name)) is not None}
    if unknown:
        names = ["config", "preflight", *_PREFLIGHT_FLAGS, *field_types()]
        hint = did_you_mean(unknown[0].removeprefix("--").split("=")[0], names)
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    if given and not preflight:
        raise InputError(f"--{next(iter(given))} needs --preflight")
    if "gpu" not in given and {"gpus", "mfu"} & given.keys():
        raise InputError("--gpus and --mfu need --gpu, which names the kind")
    if not 0 <= given.get("price_per_gpu_hour", 0) < float("inf"):
        raise InputError(f"--price_per_gpu_hour must be at least 0, found {given['price_per_gpu_hour']}")
    if given.get("gpus", 1) < 1:
        raise InputError(f"--gpus must be at least 1, found {given['gpus']}")
    if not 0 < given.get("mfu", 1) <= 1:
        raise InputError(f"--mfu must be above 0 and at most 1, found {given['mfu']}")
    return Command(load_recipe(config, overrides), preflight, given)


def main() -> None:
    """Train, or run the preflight checks."""
    command = parse_command(sys.argv[1:])
    # Importing torch and transformers takes seconds; errors in the recipe are reported before that.
    if "gpu" in command.flags:
        from training.setup.forecast import forecast

        forecast(command.recipe, **command.flags)
    elif command.preflight:
        from training.setup.preflight import preflight

        preflight(command.recipe, **command.flags)
    else:
        from training.loop import train

        train(command.recipe)


if __name__ == "__main__":
    run_command(main)
