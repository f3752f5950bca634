"""accelerate launch training/train.py [--config training/recipes/NAME.yaml] [--field value …]

Trains a GPT-2 as a recipe says; without --config, the quickstart recipe. Every key of a recipe is a flag.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python put training/ first; the project's root belongs there, so that nothing here can shadow a library's module.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gpt2_scratch_errors import CommandParser, InputError, run_command
from training.recipe import QUICKSTART, Recipe, field_types, load_recipe, nearest


def build_parser() -> argparse.ArgumentParser:
    """A parser with a flag for each key of the recipe; values stay strings until the recipe gives them their type."""
    parser = CommandParser(prog="training/train.py", description="Train a GPT-2 as a recipe says.", allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="recipe, a YAML file (default: quickstart)")
    kinds = field_types()
    for key in dataclasses.fields(Recipe):
        several = "list" in str(kinds[key.name])
        parser.add_argument(
            f"--{key.name}", nargs="*" if several else None, default=argparse.SUPPRESS, help=key.metadata["help"]
        )
    return parser


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """The recipe that the command line asks for.

    Raises:
        InputError: an unknown flag (the nearest known one is named), or anything that `load_recipe` refuses.
    """
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise InputError(f"unknown flag {unknown[0]}{nearest(name, ['config', *field_types()])}")
    overrides = vars(known)
    return load_recipe(overrides.pop("config"), overrides)


def main() -> None:
    """Train."""
    recipe = parse_recipe(sys.argv[1:])
    # torch and transformers take seconds to import: a mistake in the recipe is told before that.
    from training.loop import train

    train(recipe)


if __name__ == "__main__":
    run_command(main)
