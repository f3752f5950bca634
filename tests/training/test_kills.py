"""A run that is killed at random moments ends bit-identical to an uninterrupted one."""

from collections.abc import Callable
from pathlib import Path

from support.killing import KillFuzz

from training.recipe import Recipe

Make = Callable[..., Recipe]

# Short steps and frequent saves, so that many kills happen during a save.
OFTEN = {"max_steps": 120, "save_steps": 3, "eval_steps": 60, "sample_steps": 0, "dropout": 0.1, "logging_steps": 1}


def test_two_processes_killed_at_20_random_moments_end_bit_identical(tiny_recipe: Make, tmp_path: Path) -> None:
    fuzz = KillFuzz(tiny_recipe(output_dir=str(tmp_path / "runs"), **OFTEN), number=2, seed=5)
    fuzz.run(20)
    assert fuzz.kills == 20
    # Only a kill during a save could do harm.
    assert fuzz.moments["during a save"]
