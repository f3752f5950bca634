"""Training on a CPU uses blockwise attention in place of sdpa, and resumes with it bit for bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_models import one_thread  # noqa: F401

from common.cli_errors import InputError
from gpt2_scratch import blockwise_attention
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.setup.model import attention_for

Make = Callable[..., Recipe]


def test_on_a_cpu_sdpa_becomes_blockwise_attention(tiny_recipe: Make) -> None:
    assert attention_for(tiny_recipe(), "cpu") == "blockwise"
    assert attention_for(tiny_recipe(document_mask=True), "cpu") == "blockwise"  # which leaves masks to sdpa
    assert attention_for(tiny_recipe(attn_implementation="eager"), "cpu") == "eager"
    with pytest.raises(InputError, match="set it to sdpa"):
        attention_for(tiny_recipe(attn_implementation="blockwise"), "cuda")


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_run_in_bf16_uses_it_and_resumes_bit_for_bit(
    activation_checkpointing: bool, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    blocks = blockwise_attention._blocks
    monkeypatch.setattr(blockwise_attention, "_blocks", lambda seq: calls.append(seq) or blocks(seq))
    settings = {"mixed_precision": "bf16", "activation_checkpointing": activation_checkpointing, "max_steps": 4}
    recipe = tiny_recipe(output_dir=str(tmp_path / "run"), save_steps=2, lr_scheduler_type="constant", **settings)
    train(dataclasses.replace(recipe, max_steps=2))
    assert calls
    train(recipe)
    train(dataclasses.replace(recipe, output_dir=str(tmp_path / "at-once")))
    losses = [
        [line["train_loss"] for line in read_metrics(tmp_path / name) if "train_loss" in line]
        for name in ("run", "at-once")
    ]
    assert losses[0] == losses[1]
