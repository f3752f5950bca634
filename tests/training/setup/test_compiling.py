"""`compile: auto` compiles where it pays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from training.recipe import Recipe
from training.setup import model
from training.setup.model import compiles

Make = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ({"max_steps": 999}, False),
        ({"max_steps": 1000}, True),
        ({"max_tokens": 999 * 64}, False),
        ({"max_tokens": 1000 * 64}, True),
        ({"num_train_epochs": 0.1}, True),  # the length is not known before the corpus is tokenized
    ],
)
def test_auto_compiles_long_runs_on_a_gpu_with_triton(
    length: dict[str, Any], expected: bool, tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = {"max_steps": None, "max_tokens": None, "num_train_epochs": None}
    recipe = dataclasses.replace(tiny_recipe(), tokens_per_step=64, compile="auto", **{**lengths, **length})
    for has_triton in (True, False):
        monkeypatch.setattr(model, "has_triton", lambda found=has_triton: found)
        assert compiles(recipe, "cuda") == (expected and has_triton)
        assert not compiles(recipe, "cpu")


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_true_and_false_are_obeyed(device_type: str, tiny_recipe: Make) -> None:
    for compile in (True, False):
        assert compiles(dataclasses.replace(tiny_recipe(), compile=compile), device_type) is compile
