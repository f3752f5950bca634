"""accelerate launch training/train.py [--config training/recipes/NAME.yaml] [--field value …] [--preflight]

Trains a GPT-2 from a recipe, by default the quickstart recipe. Every recipe key is a flag. --preflight checks the
setup and reports memory, time and cost without training.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Python puts training/ first; with the project's root there instead, no file here can shadow a library's module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.cli_errors import CommandParser, InputError, did_you_mean, run_command
from training.recipe import QUICKSTART, Recipe, field_types, load_recipe


class Command(NamedTuple):
    """The parsed command line."""

    recipe: Recipe
    preflight: bool
    price_per_gpu_hour: float | None


def build_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each recipe key. Values stay strings, which `load_recipe` converts."""
    parser = CommandParser(prog="training/train.py", description="Train a GPT-2 from a recipe.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="recipe as YAML (default: the quickstart)")
    parser.add_argument("--preflight", action="store_true", help="report memory, time and cost, and exit")
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
    config, preflight, price = (overrides.pop(name) for name in ("config", "preflight", "price_per_gpu_hour"))
    if unknown:
        flags = ["config", "preflight", "price_per_gpu_hour", *field_types()]
        hint = did_you_mean(unknown[0].removeprefix("--").split("=")[0], flags)
        raise InputError(f"unknown flag {unknown[0]}{hint}")
    if price is not None and not preflight:
        raise InputError("--price_per_gpu_hour needs --preflight")
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"--price_per_gpu_hour must be at least 0, found {price}")
    return Command(load_recipe(config, overrides), preflight, price)


def main() -> None:
    """Train, or run the preflight checks."""
    command = parse_command(sys.argv[1:])
    # Importing torch and transformers takes seconds; errors in the recipe are reported before that.
    if command.preflight:
        from training.setup.preflight import preflight

        preflight(command.recipe, price_per_gpu_hour=command.price_per_gpu_hour)
    else:
        from training.loop import train

        train(command.recipe)


if __name__ == "__main__":
    run_command(main)
