"""Hooks of a user: when they are called."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_hook_of_the_user_sees_every_step(tiny_recipe: Make) -> None:
    class Record(Hook):
        def __init__(self) -> None:
            self.calls: list[str] = []
            self.losses: list[float] = []

        def before_training(self, run: Run) -> None:
            self.calls.append(f"before training from step {run.step}")

        def after_step(self, run: Run, result: StepResult) -> None:
            self.losses.append(result.loss.item())
            if run.step == 3:
                run.report("a line of my own")

        def after_save(self, run: Run, checkpoint: Path, step: int) -> None:
            self.calls.append(checkpoint.name)

        def after_training(self, run: Run) -> None:
            self.calls.append(f"after training at step {run.step}")

        def close(self) -> None:
            self.calls.append("close")

    first, second = Record(), Record()
    recipe = tiny_recipe(max_steps=4)
    train(recipe, hooks=[first])
    train(dataclasses.replace(recipe, max_steps=6), hooks=[second])
    assert first.calls == ["before training from step 0", "step-000004", "after training at step 4", "close"]
    assert second.calls == ["before training from step 4", "step-000006", "after training at step 6", "close"]
    run = Path(recipe.output_dir)
    assert first.losses + second.losses == [line["train_loss"] for line in read_metrics(run) if "train_loss" in line]
    assert "a line of my own\n" in (run / "train.log").read_text()


def test_a_hook_sees_the_last_step_before_a_stop(tiny_recipe: Make) -> None:
    steps: list[int] = []

    class StopAfterFive(Hook):
        def after_step(self, run: Run, result: StepResult) -> None:
            steps.append(run.step)
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = tiny_recipe()
    with pytest.raises(SystemExit):
        train(recipe, hooks=[StopAfterFive()])
    assert steps == [1, 2, 3, 4, 5]
    assert checkpoints(Path(recipe.output_dir))[-1].name == "step-000005"
