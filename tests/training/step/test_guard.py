"""The guard: what it skips and reports, what a skipped update leaves alone, and that no step waits for it."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.step.guard import Guard, Verdict, skip_update_if
from training.step.train_step import train_step

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def new_guard(**changes: Any) -> Guard:
    settings: dict[str, Any] = {"threshold": 3.0, "window": 4, "skip_spikes": True}
    return Guard(torch.device("cpu"), **{**settings, **changes})


def skipped_steps(guard: Guard, losses: list[float], norms: list[float] | None = None) -> list[int]:
    norms = norms or [1.0] * len(losses)
    flags = [
        guard.check(torch.tensor(loss), torch.tensor(norm)).item() for loss, norm in zip(losses, norms, strict=True)
    ]
    return [step for step, flag in enumerate(flags, start=1) if flag]


# Which updates are skipped


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_non_finite_losses_and_gradients_are_skipped_and_reported(number: float) -> None:
    guard = new_guard(threshold=0.0)
    assert skipped_steps(guard, [2.0, number, 2.0, 2.0], [1.0, 1.0, 1.0, number]) == [2, 4]
    verdicts = guard.read(wait=True)
    assert [(verdict.step, verdict.skipped, verdict.spike, verdict.skipped_in_a_row) for verdict in verdicts] == [
        *((2, True, False, 1), (4, True, False, 1))
    ]
    assert str(verdicts[0].loss) == str(verdicts[1].grad_norm) == str(number)


def test_a_spike_is_measured_against_the_losses_before_it() -> None:
    # Mean 2.5 and deviation 1.29 of 1, 2, 3, 4: with 3 deviations losses above 6.37 are spikes.
    assert skipped_steps(new_guard(), [1.0, 2.0, 3.0, 4.0, 6.3]) == []
    assert skipped_steps(new_guard(), [1.0, 2.0, 3.0, 4.0, 6.4]) == [5]
    assert skipped_steps(new_guard(), [1.0, 2.0, 3.0, 6.4]) == []  # the window is not full
    assert skipped_steps(new_guard(), [1.0, 2.0, 3.0, 4.0, -6.4]) == []  # a low loss is no spike


def test_without_skip_spikes_a_spike_is_only_reported() -> None:
    guard = new_guard(skip_spikes=False)
    assert skipped_steps(guard, [1.0, 2.0, 3.0, 4.0, 9.0]) == []
    assert guard.read(wait=True) == [Verdict(5, 9.0, 1.0, spike=True, skipped=False, skipped_in_a_row=0)]


def test_a_new_level_of_the_loss_does_not_stay_a_spike() -> None:
    assert skipped_steps(new_guard(), [1.0, 1.1, 1.0, 1.1, 9.0, 9.0, 9.0, 9.0]) == [5]


def test_a_nan_does_not_enter_the_window() -> None:
    assert skipped_steps(new_guard(), [1.0, 2.0, 3.0, 4.0, math.nan, 9.0]) == [5, 6]


def test_verdicts_are_read_some_steps_later_or_with_wait() -> None:
    guard = new_guard()
    verdicts: list[Verdict] = []
    for step in range(1, 10):
        guard.check(torch.tensor(math.nan if step == 2 else 1.0), torch.tensor(1.0))
        verdicts += guard.read()
        assert len(verdicts) == (step >= 6)
    guard.check(torch.tensor(math.nan), torch.tensor(1.0))
    verdicts += guard.read(wait=True)
    assert [verdict.step for verdict in verdicts] == [2, 10]


# What a skipped update leaves alone


def one_step(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard | None, *, step: int = 1
) -> Tensor:
    windows = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(step))
    batches = iter([(windows[:, :-1], windows[:, 1:])])
    return train_step(
        accelerator,
        model,
        optimizer,
        batches,
        accumulation_steps=1,
        learning_rate=1e-2,
        max_grad_norm=1.0,
        guard=guard,
    ).loss


@pytest.fixture(params=["adamw", "muon"])
def prepared(request: pytest.FixtureRequest, tiny_recipe: Make) -> tuple[Accelerator, nn.Module, Any]:
    from support.tiny_models import tiny

    from training.optim.optimizer import build_optimizer

    accelerator = Accelerator(cpu=True)
    model = tiny().train()
    return (accelerator, *accelerator.prepare(model, build_optimizer(model, tiny_recipe(optimizer=request.param))))


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for number, moments in optimizer.state_dict()["state"].items():
        state |= {f"{number}/{name}": tensor.clone() for name, tensor in moments.items()}
    return state


@pytest.mark.parametrize("non_finite", ["loss", "gradient"])
def test_a_skipped_update_leaves_weights_moments_and_step_counters_bit_identical(
    non_finite: str, prepared: tuple[Accelerator, nn.Module, Any]
) -> None:
    accelerator, model, optimizer = prepared
    guard = new_guard(threshold=0.0)
    one_step(accelerator, model, optimizer, guard)
    before = everything(model, optimizer)
    assert any(name.endswith("/step") for name in before)
    weight = model.lm_head.weight if non_finite == "loss" else model.transformer.h[0].mlp.c_fc.bias
    if non_finite == "loss":
        hook: Any = model.register_forward_hook(
            lambda module, inputs, outputs: outputs.__setitem__("loss", outputs.loss * torch.nan)
        )
    else:
        hook = weight.register_hook(lambda gradient: gradient / 0.0)
    one_step(accelerator, model, optimizer, guard, step=2)
    hook.remove()
    after = everything(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    one_step(accelerator, model, optimizer, guard, step=3)
    assert not torch.equal(everything(model, optimizer)["transformer.wte.weight"], before["transformer.wte.weight"])


def test_a_guard_that_skips_nothing_changes_nothing(prepared: tuple[Accelerator, nn.Module, Any]) -> None:
    import copy

    accelerator, model, optimizer = prepared
    start, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    ends = []
    for guard in (None, new_guard()):
        model.load_state_dict(start)
        optimizer.load_state_dict(copy.deepcopy(moments))
        for step in range(1, 4):
            one_step(accelerator, model, optimizer, guard, step=step)
        ends.append(everything(model, optimizer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_optimizer_that_cannot_skip_is_refused() -> None:
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(TypeError, match="SGD cannot skip an update"):
        skip_update_if(torch.zeros(()), plain)


def test_no_step_waits_for_the_device(
    prepared: tuple[Accelerator, nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reads(TorchDispatchMode):
        """Counts the operations that copy a number from the device to the host, which waits for it."""

        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket in (
                *(torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal),
                torch.ops.aten.is_nonzero,
            )
            return func(*args, **(kwargs or {}))

    # On CPUs the model checks its ids; on a GPU it does not.
    for module in ("pretrained", "modeling"):
        monkeypatch.setattr(f"gpt2_scratch.{module}_gpt2_scratch.check_range", lambda *arguments: None)
    accelerator, model, optimizer = prepared
    guard = new_guard()
    with Reads() as reads:
        for step in range(1, 9):
            loss = one_step(accelerator, model, optimizer, guard, step=step)
            guard.read()
        assert reads.count == 0
        loss.item()
        assert reads.count == 1


# Complete runs


def scale_losses(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """Multiply the losses that the guard sees at some steps."""
    check = Guard.check
    monkeypatch.setattr(
        Guard, "check", lambda self, loss, norm: check(self, loss * factors.get(self._step + 1, 1.0), norm)
    )


def test_training_continues_after_a_non_finite_loss_and_logs_it(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt2_scratch import GPT2ScratchForCausalLM

    forward, calls = GPT2ScratchForCausalLM.forward, []

    def fail_once(self: Any, *arguments: Any, **keywords: Any) -> Any:
        outputs = forward(self, *arguments, **keywords)
        if self.training:
            calls.append(1)
            if len(calls) == 6:  # the second of two passes of step 3
                outputs["loss"] = outputs.loss * math.inf
        return outputs

    monkeypatch.setattr(GPT2ScratchForCausalLM, "forward", fail_once)
    recipe = tiny_recipe(max_steps=6, save_steps=0)
    train(recipe)
    run = Path(recipe.output_dir)
    printed = capsys.readouterr().out
    assert "step 3  update skipped: loss inf  norm nan  samples 16 to 23\n" in printed
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if "guard" in line] == [
        {"step": 3, "tokens": 768, "guard": "skipped", "loss": "Infinity", "grad_norm": "NaN", "samples": [16, 23]}
    ]
    assert [line["train_loss"] for line in lines if line["step"] == 3 and "train_loss" in line] == ["Infinity"]
    assert [line["train_loss"] for line in read_metrics(run) if "train_loss" in line][2] == math.inf
    assert "3 train inf\n" in (run / "log.txt").read_text()
    assert (run / "curves.png").stat().st_size > 0
    assert [line["val_loss"] < 6 for line in lines if "val_loss" in line] == [True]


def test_too_many_skipped_updates_in_a_row_name_the_newest_good_checkpoint(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(max_steps=40, save_steps=2, eval_steps=6, sample_steps=0, max_skipped_steps=3)
    scale_losses(monkeypatch, {3: math.nan, 4: math.nan, 6: math.nan, 7: math.nan, 8: math.inf})
    message = r"3 updates in a row were skipped up to step 8, .* the newest good checkpoint is .*step-000006, and"
    with pytest.raises(InputError, match=message) as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    # No checkpoint was saved after step 4, whose update was skipped. The validation of step 6 gave a finite loss.
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["step-000002", "step-000006"]
    monkeypatch.undo()
    train(dataclasses.replace(recipe, max_steps=8))


def test_a_resumed_run_skips_the_same_updates_as_an_uninterrupted_one(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = tiny_recipe(
        output_dir=str(tmp_path / "complete"),
        save_total_limit=None,
        skip_spikes=True,
        spike_window=4,
        spike_threshold=5.0,
    )
    scale_losses(monkeypatch, {9: 1.5, 10: math.nan})
    train(complete)
    resumed = dataclasses.replace(complete, output_dir=str(tmp_path / "resumed"))
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    (tmp_path / "resumed" / "recipe.yaml").write_text((tmp_path / "complete" / "recipe.yaml").read_text())
    shutil.move(tmp_path / "complete" / "checkpoints" / "step-000008", tmp_path / "resumed" / "checkpoints")
    train(resumed)
    reported = [
        [line for line in read_metrics(run) if "guard" in line] for run in (tmp_path / "complete", tmp_path / "resumed")
    ]
    # Four losses from before the checkpoint are in the window: without them, step 9 would not be a spike.
    assert [(line["step"], line["guard"]) for line in reported[0]] == [(9, "skipped"), (10, "skipped")]
    assert str(reported[0]) == str(reported[1])  # NaN is not equal to itself
    model = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("complete", "resumed")]
    assert model[0] == model[1]


def test_the_checkpoint_just_before_the_first_skipped_update_is_not_called_good(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(max_steps=40, save_steps=1, save_total_limit=None, eval_steps=0, max_skipped_steps=3)
    scale_losses(monkeypatch, {5: math.nan, 6: math.nan, 7: math.nan})
    with pytest.raises(InputError, match=r"newest good checkpoint is \S*step-000003; resume from it with --resume_"):
        train(recipe)
