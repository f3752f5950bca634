"""Validation, samples and tasks during compiled training: they recompile nothing and draw no random numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_tasks import write_tasks
from torch._dynamo.testing import CompileCounter

from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def tasks(folder: Path) -> dict[str, Any]:
    """Recipe keys that evaluate HellaSwag and generated words."""
    data = write_tasks(folder / "tasks", count=3)
    return {"eval_tasks": ["hellaswag", "lambada:word"], "eval_data_dir": str(data), "n_positions": 96}


def losses(recipe: Recipe) -> list[float]:
    return [line["train_loss"] for line in read_metrics(Path(recipe.output_dir)) if "train_loss" in line]


def test_evaluation_never_recompiles_the_training_step(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = CompileCounter()  # counts the captured graphs and runs them as they are
    compile_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_model(model, backend=compiled, **options))
    torch._dynamo.reset()
    counts: list[int] = []

    class Count(Hook):
        def after_step(self, run: Run, result: StepResult) -> None:
            counts.append(compiled.frame_count)

    # 31 windows of validation are 7 batches of 4 and one of 3.
    often = {"eval_steps": 2, "sample_steps": 2, "eval_task_steps": 2, **tasks(tmp_path)}
    train(tiny_recipe(compile=True, max_steps=10, eval_tokens=31 * 32, save_steps=0, dropout=0.1, **often), [Count()])
    assert counts[0] >= 1
    # The first validation compiles the model for evaluation, once; training is never compiled again.
    assert counts[:2] == counts[:1] * 2
    assert counts[2:] == [counts[2]] * 8
    assert counts[2] <= 2 * counts[0]
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_leaves_the_random_state_of_training_alone(
    compiled: bool, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiled:
        compile_model = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model, **options: compile_model(model, backend="eager", **options))
    settings: dict[str, Any] = {"compile": compiled, "max_steps": 6, "dropout": 0.1, "save_steps": 0, "n_positions": 96}
    everything = {"eval_steps": 1, "sample_steps": 1, "eval_task_steps": 1, **tasks(tmp_path)}
    often = tiny_recipe(output_dir=str(tmp_path / "often"), **{**settings, **everything})
    never = tiny_recipe(output_dir=str(tmp_path / "never"), **settings, eval_steps=0, sample_steps=0)
    states = []
    for recipe in (often, never):
        train(recipe)
        states.append(torch.get_rng_state())
    assert losses(often) == losses(never)
    assert torch.equal(*states)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("often", "never")]
    assert weights[0] == weights[1]
