"""fp16 with loss scaling, on a CPU: the same steps as in fp32, overflows that cost an update, and a resume."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.one_step import recipe, tokens
from support.tiny_models import one_thread, tiny  # noqa: F401
from torch import Tensor

from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import OptimizerName, Recipe
from training.setup.accelerator import build_accelerator
from training.setup.model import prepare_for_training
from training.step.guard import Guard, Verdict
from training.step.precision import loss_scale_state
from training.step.train_step import StepResult, train_step

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Trained:
    """A tiny model in training, with `scale` as its first loss scale."""

    def __init__(self, precision: Any, optimizer: OptimizerName = "adamw", scale: float | None = None) -> None:
        chosen = dataclasses.replace(recipe(optimizer), mixed_precision=precision)
        self.accelerator = build_accelerator(chosen)
        self.model, self.optimizer = prepare_for_training(self.accelerator, tiny().train(), chosen)
        self.scale = loss_scale_state(self.accelerator)
        if scale is not None:
            self.scale["loss_scale/scale"].fill_(scale)
        self.guard = Guard(self.accelerator.device, threshold=3.0, window=2, skip_spikes=True, loss_scale=self.scale)

    def step(self) -> StepResult:
        ids = tokens(4, seed=1)
        return train_step(
            self.accelerator,
            self.model,
            self.optimizer,
            iter([(ids[:2, :-1], ids[:2, 1:]), (ids[2:, :-1], ids[2:, 1:])]),
            accumulation_steps=2,
            learning_rate=1e-2,
            max_grad_norm=0.5,
            guard=self.guard,
        )

    def tensors(self) -> Iterator[Tensor]:
        moments = (tensor for state in self.optimizer.state.values() for tensor in state.values())
        return (tensor.detach().clone() for tensor in itertools.chain(self.model.parameters(), moments))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_and_clipped_steps_in_fp16_follow_those_in_fp32(optimizer: OptimizerName) -> None:
    from accelerate.state import AcceleratorState

    exact = Trained("no", optimizer)
    expected = [exact.step() for _ in range(3)]
    AcceleratorState._reset_state(True)
    half = Trained("fp16", optimizer)
    assert half.accelerator.scaler is not None
    for found, reference in zip([half.step() for _ in range(3)], expected, strict=True):
        # fp16 has 11 bits.
        torch.testing.assert_close(found.loss, reference.loss, rtol=1e-3, atol=0)
        torch.testing.assert_close(found.grad_norm, reference.grad_norm, rtol=4e-3, atol=0)
        assert found.loss != reference.loss  # so the products were in fp16
        assert found.grad_norm > 0.5  # so that it was clipped
    assert half.scale["loss_scale/growth_tracker"] == 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(optimizer: OptimizerName) -> None:
    trained = Trained("fp16", optimizer)
    trained.step()
    before = list(trained.tensors())
    trained.scale["loss_scale/scale"].fill_(2.0**40)
    assert not trained.step().grad_norm.isfinite()
    assert all(map(torch.equal, before, trained.tensors()))
    assert trained.scale["loss_scale/scale"] == 2.0**39
    trained.scale["loss_scale/scale"].fill_(2.0**10)
    trained.step()
    assert not torch.equal(before[0], next(trained.tensors()))
    (verdict,) = trained.guard.read(wait=True)
    assert (verdict.step, verdict.skipped, verdict.spike, verdict.overflowed_scale) == (2, True, False, 2.0**40)
    assert trained.guard.skipped_in_a_row == verdict.skipped_in_a_row == 0


def test_gradients_that_overflow_with_a_scale_below_1_count_as_skipped_updates() -> None:
    scale = torch.tensor(4.0)
    guard = Guard(
        torch.device("cpu"), threshold=0.0, window=2, skip_spikes=False, loss_scale={"loss_scale/scale": scale}
    )
    for value in (4.0, 2.0, 1.0, 0.5, 0.25):
        scale.fill_(value)
        guard.check(torch.tensor(3.0), torch.tensor(torch.inf))
    guard.check(torch.tensor(torch.nan), torch.tensor(torch.nan))
    found = [(verdict.overflowed_scale, verdict.skipped_in_a_row) for verdict in guard.read(wait=True)]
    assert found == [(4.0, 0), (2.0, 0), (1.0, 0), (None, 1), (None, 2), (None, 3)]


def test_an_overflow_is_no_spike() -> None:
    scale = torch.tensor(8.0)
    guard = Guard(
        torch.device("cpu"), threshold=3.0, window=2, skip_spikes=True, loss_scale={"loss_scale/scale": scale}
    )
    for loss in (1.0, 1.1):
        guard.check(torch.tensor(loss), torch.tensor(1.0))
    guard.check(torch.tensor(9.0), torch.tensor(torch.inf))
    assert guard.read(wait=True) == [Verdict(3, 9.0, torch.inf, False, True, 0, 8.0)]


def test_a_resumed_run_in_fp16_has_the_weights_and_the_loss_scale_of_an_uninterrupted_one(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate.state import AcceleratorState

    # Overflows in the first two steps.
    monkeypatch.setattr(torch.amp.GradScaler.__init__, "__defaults__", ("cuda", 2.0**40, 2.0, 2.0**-13, 3, True))
    settings = {"mixed_precision": "fp16", "save_steps": 3, "eval_steps": 0, "sample_steps": 0, "max_steps": 6}
    complete = tiny_recipe(**settings, output_dir=str(tmp_path / "complete"))
    train(complete)
    assert "update skipped, gradients overflow with loss scale 1.09951e+12, now" in capsys.readouterr().out
    branch = tiny_recipe(
        **settings,
        output_dir=str(tmp_path / "branch"),
        resume_from_checkpoint=str(checkpoints(tmp_path / "complete")[0]),
    )
    AcceleratorState._reset_state(True)
    train(branch)
    overflows = [line for line in read_metrics(tmp_path / "complete") if line.get("guard") == "overflow"]
    assert [(line["step"], line["loss_scale"]) for line in overflows] == [(1, 2.0**40), (2, 2.0**27)]
    ends = [checkpoints(tmp_path / name)[-1] for name in ("complete", "branch")]
    for file in ("model.safetensors", "training_state/optimizer.safetensors", "training_state/loop_state.safetensors"):
        one, other = (load_file(end / file) for end in ends)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor.nan_to_num(), other[name].nan_to_num()) for name, tensor in one.items())
    state = load_file(ends[1] / "training_state" / "loop_state.safetensors")
    assert state["loss_scale/scale"] == 2.0**15  # doubled after three steps, of which the branch took two
    assert json.loads((ends[1] / "training_state" / "trainer_state.json").read_text())["format_version"] == 1
