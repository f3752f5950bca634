"""The plan of a run: its errors before training, and its length."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.cli_errors import InputError
from training.data.loading.order import Order
from training.loop import train
from training.recipe import Recipe
from training.setup.plan import total_steps

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, r"belongs to another run \(n_layer: 2 → 3\); undo the change, or choose another output_dir"),
        ({"seed": 1, "seq_len": 16}, r"another run \(seq_len: 32 → 16; seed: 1337 → 1\)"),
        ({"optimizer": "muon"}, r"another run \(optimizer: adamw → muon\); undo the change"),
        ({"resume_from_checkpoint": "none"}, "already contains a run, and resume_from_checkpoint is none"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is not a checkpoint: it has no training_state"),
    ],
)
def test_output_folder_of_another_run_is_an_error(change: dict[str, object], message: str, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(recipe.output_dir).rglob("*"))
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(recipe, **change))  # type: ignore[arg-type]
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(recipe.output_dir).rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_step": 200}, "is not a multiple of per_device_train_batch_size 4 × seq_len 32"),
        ({"corpus": "nowhere"}, "nowhere"),
        ({"tokenizer": "train:999"}, "train:999"),
        ({"data_dir": "absent", "corpus": "absent.txt"}, "absent.txt"),
        ({"seq_len": 4096, "tokens_per_step": 16384}, "validation shard .* holds 2,000 tokens"),
        ({"init_from": "no/such/model"}, "cannot build the model"),
        ({"init_from": "/tmp/no/such/model"}, "init_from /tmp/no/such/model is no folder; check the path"),
        (
            {"n_layer": 10_000, "n_embd": 2**17},
            r"parameters needs [\d,]+ GiB, but this machine has [\d,]+ GiB",
        ),
        (
            {"attn_implementation": "flex_attention"},
            "flex_attention needs a GPU with Triton and dropout 0; set it to sdpa",
        ),
        (
            {"attn_implementation": "flash_attention_2", "document_mask": True},
            "flash_attention_2 does not separate documents; set it to sdpa, or document_mask to false",
        ),
        ({"attn_implementation": "flash"}, "cannot build the model"),
        ({"max_steps": None, "max_tokens": 10}, "shorter than one step"),
        ({"max_steps": None, "num_train_epochs": 0.001}, "shorter than one step"),
    ],
)
def test_what_cannot_work_is_an_error_before_training(
    change: dict[str, object], message: str, tiny_recipe: Make
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train(tiny_recipe(**change))
    assert "\n" not in str(caught.value)
    assert not (Path(tiny_recipe().output_dir) / "checkpoints").exists()


def test_foreign_shards_of_another_tokenizer_are_an_error(tiny_recipe: Make, tmp_path: Path) -> None:
    for name, size in (("x_val_000000", 500), ("x_train_000001", 3000)):
        np.save(tmp_path / f"{name}.npy", np.full(size, 300, dtype="<u2"))
    with pytest.raises(InputError, match="the vocabulary has 300 ids"):
        train(tiny_recipe(data_dir=str(tmp_path), tokenizer=tiny_recipe().data_dir))


def test_epochs_and_tokens_become_steps(tiny_recipe: Make) -> None:
    order = Order([3201], seq_len=32, seed=0)  # 100 windows in epoch 0
    assert total_steps(tiny_recipe(max_steps=None, num_train_epochs=1), order) == 100 * 32 // 256
    assert total_steps(tiny_recipe(max_steps=None, num_train_epochs=0.5), order) == 50 * 32 // 256
    assert total_steps(tiny_recipe(max_steps=None, max_tokens=2600), order) == 10


def test_fraction_of_an_epoch_is_read_in_decimal(tiny_recipe: Make) -> None:
    order = Order([3233], seq_len=32, seed=0)
    assert [order.windows_in_epoch(epoch) for epoch in range(3)] == [101, 100, 100]
    # As binary floats, 2.3 - 2 is less than 0.3, which would give 29 windows.
    recipe = tiny_recipe(max_steps=None, num_train_epochs=2.3, tokens_per_step=32, per_device_train_batch_size=1)
    assert total_steps(recipe, order) == 101 + 100 + 30
