"""accelerate launch training/train.py [--config training/recipes/NAME.yaml] [--field value …] [--preflight]

Trains a GPT-2 as a recipe says; without --config, the quickstart recipe. Every key of a recipe is a flag. With
--preflight, it only says what that would take.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # Python put training/ first; the project's root belongs there, so that nothing here can shadow a library's module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from common.cli_errors import CommandParser, InputError, run_command
from common.suggestions import did_you_mean
from training.recipe import QUICKSTART, Recipe, field_types, load_recipe


@dataclass(frozen=True)
class Command:
    """What the command line asks for: a run, or with `preflight` only its forecast."""

    recipe: Recipe
    preflight: bool
    price_per_gpu_hour: float | None


def build_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each key of the recipe; values stay strings until the recipe gives them their type."""
    parser = CommandParser(prog="training/train.py", description="Train a GPT-2 as a recipe says.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="recipe, a YAML file (default: quickstart)")
    parser.add_argument("--preflight", action="store_true", help="check the processes, say what the run takes, stop")
    parser.add_argument("--price_per_gpu_hour", type=float, help="with --preflight: for the run's cost")
    kinds = field_types()
    for key in dataclasses.fields(Recipe):
        several = "list" in str(kinds[key.name])
        parser.add_argument(
            f"--{key.name}", nargs="*" if several else None, default=argparse.SUPPRESS, help=key.metadata["help"]
        )
    return parser


def parse_command(arguments: Sequence[str]) -> Command:
    """What the command line asks for.

    Raises:
        InputError: an unknown flag (the nearest known one is named), or anything that `load_recipe` refuses.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    overrides = vars(known)
    config, preflight, price = (overrides.pop(name) for name in ("config", "preflight", "price_per_gpu_hour"))
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        flags = ["config", "preflight", "price_per_gpu_hour", *field_types()]
        raise InputError(f"unknown flag {unknown[0]}{did_you_mean(name, flags)}")
    if price is not None and not preflight:
        raise InputError("price_per_gpu_hour says what a run costs before it starts; add --preflight, or leave it out")
    if price is not None and not 0 <= price < float("inf"):
        raise InputError(f"price_per_gpu_hour: expected an amount of at least 0, found {price}")
    return Command(load_recipe(config, overrides), preflight, price)


def main() -> None:
    """Train, or say what training takes."""
    command = parse_command(sys.argv[1:])
    # torch and transformers take seconds to import: a mistake in the recipe is told before that.
    if command.preflight:
        from training.setup.preflight import preflight

        preflight(command.recipe, price_per_gpu_hour=command.price_per_gpu_hour)
    else:
        from training.loop import train

        train(command.recipe)


if __name__ == "__main__":
    run_command(main)
