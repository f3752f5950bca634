"""Runs that must end alike: interrupted, accumulated, on several processes, compiled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.launching import train_in_two
from support.trained import assert_same, losses, optimizer_state, weights

from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize(("optimizer", "stop"), [("adamw", 4), ("adamw", 8), ("muon", 4)])
def test_an_interrupted_run_ends_bit_identical_to_a_complete_one(
    optimizer: str, stop: int, tiny_recipe: Make, tmp_path: Path
) -> None:
    output_dir = str(tmp_path / "complete")
    options = {"optimizer": optimizer, "dropout": 0.1, "seq_len_warmup_steps": 6, "save_total_limit": None}
    complete = tiny_recipe(output_dir=output_dir, **options)
    train(complete)
    interrupted = dataclasses.replace(complete, output_dir=str(tmp_path / "interrupted"))
    # A run that was killed after a checkpoint: its log already has later lines.
    run = Path(interrupted.output_dir)
    (run / "checkpoints").mkdir(parents=True)
    Path(tmp_path / "complete" / "checkpoints" / f"step-{stop:06d}").rename(run / "checkpoints" / f"step-{stop:06d}")
    for name in ("metrics.jsonl", "log.txt", "recipe.yaml"):
        (run / name).write_bytes((tmp_path / "complete" / name).read_bytes())
    train(interrupted)
    assert_same(weights(run / "model"), weights(tmp_path / "complete" / "model"))
    assert_same(optimizer_state(checkpoints(run)[-1]), optimizer_state(checkpoints(tmp_path / "complete")[-1]))
    assert losses(interrupted) == losses(complete)
    steps = [line["step"] for line in read_metrics(run) if "train_loss" in line]
    assert steps == list(range(1, 13))


def test_accumulation_gives_the_same_weights_as_one_large_batch(tiny_recipe: Make, tmp_path: Path) -> None:
    large = tiny_recipe(output_dir=str(tmp_path / "large"), per_device_train_batch_size=8, max_steps=4)
    small = tiny_recipe(output_dir=str(tmp_path / "small"), per_device_train_batch_size=1, max_steps=4)
    train(large)
    train(small)
    # Sums in a different order: fp32 rounding, amplified by AdamW where a gradient is almost 0.
    for key, loss in losses(large).items():
        assert losses(small)[key] == pytest.approx(loss, abs=1e-5), key


@pytest.mark.parametrize(("optimizer", "accumulated"), [("adamw", 1), ("muon", 2)])
def test_two_processes_equal_one(optimizer: str, accumulated: int, tiny_recipe: Make, tmp_path: Path) -> None:
    one = tiny_recipe(output_dir=str(tmp_path / "one"), optimizer=optimizer, max_steps=6)
    assert isinstance(one.per_device_train_batch_size, int)
    per_device = one.per_device_train_batch_size // accumulated
    two = dataclasses.replace(one, output_dir=str(tmp_path / "two"), per_device_train_batch_size=per_device)
    train(one)
    assert f"2 processes × {accumulated} accumulated" in train_in_two(two)
    for key, loss in losses(one).items():
        # The mean of two halves instead of one sum: fp32 rounding.
        assert losses(two)[key] == pytest.approx(loss, abs=1e-5), key
    assert {path.name for path in (checkpoints(Path(two.output_dir))[-1] / "training_state").iterdir()} == {
        *("SHA256SUMS", "trainer_state.json", "optimizer.safetensors", "loop_state.safetensors"),
        *("rng_state_0.safetensors", "rng_state_1.safetensors"),
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_two_processes_resumes_on_one_over_the_same_samples(
    optimizer: str, tiny_recipe: Make, tmp_path: Path
) -> None:
    # Sequences are still short where one process takes over.
    complete = tiny_recipe(output_dir=str(tmp_path / "complete"), optimizer=optimizer, seq_len_warmup_steps=10)
    train(complete)
    resumed = dataclasses.replace(complete, output_dir=str(tmp_path / "resumed"))
    # The same schedule, killed after step 8: its later checkpoint is moved away.
    train_in_two(resumed)
    run = Path(resumed.output_dir)
    newest = checkpoints(run)[-1]
    newest.rename(tmp_path / "moved")
    train(resumed)
    for key, loss in losses(complete).items():
        assert losses(resumed)[key] == pytest.approx(loss, abs=1e-5), key


def test_bf16_trains_to_nearly_the_same_loss(tiny_recipe: Make, tmp_path: Path) -> None:
    full = tiny_recipe(output_dir=str(tmp_path / "full"))
    half = tiny_recipe(output_dir=str(tmp_path / "half"), mixed_precision="bf16")
    train(full)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # the precision is part of it
    train(half)
    # bf16 keeps 8 bits of mantissa: a relative error near 0.4 % in each product, far less in the mean.
    assert losses(half)[12, "val_loss"] == pytest.approx(losses(full)[12, "val_loss"], rel=0.01)
    assert weights(Path(half.output_dir) / "model")["transformer.wte.weight"].dtype == torch.float32


@pytest.mark.parametrize("knob", ["activation_checkpointing", "compile"])
def test_settings_for_speed_and_memory_do_not_change_the_losses(knob: str, tiny_recipe: Make, tmp_path: Path) -> None:
    plain = tiny_recipe(output_dir=str(tmp_path / "plain"), max_steps=4, eval_steps=2, sample_steps=2)
    train(plain)
    changed = dataclasses.replace(plain, output_dir=str(tmp_path / "changed"), **{knob: True})
    train(changed)
    for key, loss in losses(plain).items():
        # The compiler fuses operations, which changes rounding.
        assert losses(changed)[key] == pytest.approx(loss, abs=1e-5), key
    saved = weights(Path(changed.output_dir) / "model")
    assert saved.keys() == weights(Path(plain.output_dir) / "model").keys()  # no `_orig_mod.`
