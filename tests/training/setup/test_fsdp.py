"""FSDP2: the same losses as DDP, ordinary model folders, and checkpoints that each can resume from."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launching import train_in_two

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def losses(run: Path) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name]
        for line in read_metrics(run)
        for name in ("train_loss", "grad_norm", "val_loss")
        if name in line
    }


def killed_after(run: Path, recipe: Recipe, step: int) -> Recipe:
    """The recipe of a run that was killed after saving the checkpoint of `step` of another run."""
    copied = dataclasses.replace(recipe, output_dir=f"{run}-continued")
    folder = Path(copied.output_dir)
    name = f"step-{step:06d}"
    shutil.copytree(run / "checkpoints" / name, folder / "checkpoints" / name)
    for file in ("metrics.jsonl", "log.txt", "recipe.yaml"):
        shutil.copy(run / file, folder / file)
    return copied


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_fsdp2_trains_like_ddp_and_resumes_from_its_checkpoints(
    optimizer: str, tiny_recipe: Make, tmp_path: Path
) -> None:
    output_dir = str(tmp_path / "ddp")
    ddp = tiny_recipe(output_dir=output_dir, optimizer=optimizer, per_device_train_batch_size=2, max_steps=8)
    fsdp2 = dataclasses.replace(ddp, output_dir=str(tmp_path / "fsdp2"))
    train_in_two(ddp, "cpu_2_processes")
    output = train_in_two(fsdp2, "fsdp2_8xa100")
    assert "To try next" in output
    assert output.count("  | ") >= 2  # samples, drawn by both ranks and printed by one
    expected = losses(tmp_path / "ddp")
    assert {key for key in expected if key[0] == 8} == {(8, "train_loss"), (8, "grad_norm"), (8, "val_loss")}
    # Sums are in another order: fp32 rounding.
    assert losses(tmp_path / "fsdp2") == pytest.approx(expected, abs=1e-5)

    from_ddp = killed_after(tmp_path / "ddp", fsdp2, 4)
    assert "resumed from" in train_in_two(from_ddp, "fsdp2_8xa100")
    assert losses(Path(from_ddp.output_dir)) == pytest.approx(expected, abs=1e-5)
    from_fsdp2 = killed_after(tmp_path / "fsdp2", ddp, 4)
    train(from_fsdp2)  # with one process: what DDP saves does not depend on the number
    assert losses(Path(from_fsdp2.output_dir)) == pytest.approx(expected, abs=1e-5)

    assert_ordinary_folders(tmp_path / "fsdp2", like=tmp_path / "ddp")


@pytest.mark.slow
def test_sharded_and_compiled_blocks_train_like_uncompiled_ones(tiny_recipe: Make, tmp_path: Path) -> None:
    plain = tiny_recipe(output_dir=str(tmp_path / "plain"), max_steps=6, save_steps=3)
    compiled = dataclasses.replace(plain, output_dir=str(tmp_path / "compiled"), compile=True)
    train_in_two(plain, "fsdp2_8xa100")
    train_in_two(compiled, "fsdp2_8xa100")
    # Sums are in another order: fp32 rounding.
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)
    assert_ordinary_folders(tmp_path / "compiled", like=tmp_path / "plain")


def assert_ordinary_folders(run: Path, *, like: Path) -> None:
    from transformers import AutoModelForCausalLM

    import gpt2_scratch  # noqa: F401 - registers the Auto classes

    for folder, other in ((run / "model", like / "model"), (checkpoints(run)[-1], checkpoints(like)[-1])):
        stored, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
        assert stored.keys() == expected.keys()
        assert "lm_head.weight" not in stored  # tied, so it is not stored twice
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == "GPT2ScratchForCausalLM"
        assert (folder / "config.json").read_text() == (other / "config.json").read_text()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
        assert model.lm_head.weight is model.transformer.wte.weight


def test_model_too_small_to_shard_is_an_error() -> None:
    from types import SimpleNamespace
    from typing import Any

    from support.tiny_models import tiny

    from training.setup.fsdp import shard

    many: Any = SimpleNamespace(num_processes=33)
    with pytest.raises(InputError, match="32 rows cannot be sharded across 33 processes; train a model this small"):
        shard(tiny(), many)
