"""Traces of the profiler."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training.loop import train
from training.recipe import Recipe, profiled_steps

Make = Callable[..., Recipe]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_writes_a_trace_of_the_profiled_steps(tiny_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(max_steps=5, profile_steps="2-3", eval_steps=0, sample_steps=0, save_steps=0)
    train(recipe)
    path = Path(recipe.output_dir) / "trace-steps-2-3.json.gz"
    assert f"trace of steps 2 to 3 in {path}; open it at https://ui.perfetto.dev" in capsys.readouterr().out
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    updates = [name for name in names if name and name.startswith("Optimizer.step#AdamW")]
    assert len(updates) == 2


@pytest.mark.parametrize(
    ("text", "steps"), [("10-12", [10, 11, 12]), (" 7 ", [7]), ("12-10", []), ("0-3", []), ("1e3", []), ("", [])]
)
def test_profile_steps_are_parsed(text: str, steps: list[int]) -> None:
    assert list(profiled_steps(text)) == steps


@pytest.mark.usefixtures("fresh_accelerator")
def test_steps_that_a_start_does_not_take_are_not_traced(tiny_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(max_steps=2, profile_steps="2-9", eval_steps=0, sample_steps=0, save_steps=0)
    train(recipe)
    assert (Path(recipe.output_dir) / "trace-steps-2-2.json.gz").is_file()
    train(dataclasses.replace(recipe, max_steps=3, profile_steps="1-2"))
    assert "no trace: this start takes none of the steps 1-2" in capsys.readouterr().out
