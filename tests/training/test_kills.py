"""A run that is killed at random moments ends bit-identical to an uninterrupted one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.killing import KillFuzz

from training.recipe import Recipe

Make = Callable[..., Recipe]

# Short steps and frequent saves, so that many kills happen during a save.
OFTEN = {"max_steps": 120, "save_steps": 3, "eval_steps": 60, "sample_steps": 0, "dropout": 0.1, "logging_steps": 1}


@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 10)])
def test_runs_killed_at_random_moments_end_bit_identical(
    processes: int, kills: int, tiny_recipe: Make, tmp_path: Path
) -> None:
    fuzz = KillFuzz(tiny_recipe(output_dir=str(tmp_path / "runs"), **OFTEN), number=processes, seed=5)
    fuzz.run(kills)
    assert fuzz.kills == kills
    # Only a kill during a save could do harm.
    assert fuzz.moments["during a save"]
