"""The model to train agrees with its tokenizer."""

import contextlib
from pathlib import Path

import pytest
import torch

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from training.data.tokenization.tokenizer import Tokenizer, train_bpe
from training.setup.model import Vocabulary, build_model


def _with_pad_token(folder: Path) -> Tokenizer:
    ranks = train_bpe(["some words of text, more words"] * 9, 262).ranks
    special_tokens = {"</s>": 261, "<pad>": 262}
    Tokenizer(ranks, special_tokens, end_of_text="</s>", config={"pad_token": "<pad>"}).save(folder)
    return Tokenizer.load(folder)


def test_config_has_the_ids_of_the_tokenizer(tmp_path, tiny_recipe):
    model = build_model(tiny_recipe(), _with_pad_token(tmp_path), device_type="cpu")
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (261, 261, 262)


def test_model_to_start_from_gets_the_ids_of_the_tokenizer(tmp_path, tiny_recipe):
    config = GPT2ScratchConfig(
        vocab_size=263, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    GPT2ScratchForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer = _with_pad_token(tmp_path / "tokenizer")
    model = build_model(tiny_recipe(init_from=str(tmp_path / "model")), tokenizer, device_type="cpu")
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (261, 261, 262)


@pytest.mark.parametrize("changes", [{"seq_len": 48}, {"n_positions": 48}])
def test_more_positions_than_the_model_to_start_from_are_interpolated(tmp_path, tiny_recipe, changes):
    config = GPT2ScratchConfig(
        vocab_size=300, n_positions=20, n_embd=32, n_layer=1, n_head=2, bos_token_id=299, eos_token_id=299, n_ctx=20
    )
    first = GPT2ScratchForCausalLM(config).eval()
    first.save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(init_from=str(tmp_path / "model"), tokens_per_step=48 * 8, **{"seq_len": 12, **changes})
    lines = []
    grown = build_model(recipe, Vocabulary(300, 299), device_type="cpu", report=lines.append).eval()
    learned, table = first.transformer.wpe.weight, grown.transformer.wpe.weight
    for row in range(48):
        place = row * 19 / 47  # in the old table, whose ends stay the ends
        below = min(int(place), 18)
        expected = learned[below] * (below + 1 - place) + learned[below + 1] * (place - below)
        torch.testing.assert_close(table[row], expected, rtol=1e-4, atol=1e-6)
    assert table.requires_grad
    assert grown.config.n_positions == grown.config.n_ctx == 48
    assert grown(torch.arange(48)[None]).logits.isfinite().all()
    assert lines == ["positions: init_from has 20, the recipe 48; the table transformer.wpe was interpolated linearly"]
    grown.save_pretrained(tmp_path / "checkpoint")
    resumed = build_model(
        recipe, Vocabulary(300, 299), device_type="cpu", weights=tmp_path / "checkpoint", report=lines.append
    )
    assert torch.equal(resumed.transformer.wpe.weight, table)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 12}, "the recipe has n_layer=12, but init_from .* has 1; remove n_layer"),
        ({"n_embd": 64}, "the recipe has n_embd=64, but init_from .* has 32; remove n_embd"),
        ({"n_head": 4}, "the recipe has n_head=4, but init_from .* has 2; remove n_head"),
        ({"seq_len": 12, "n_positions": 16}, "the recipe has n_positions=16, but init_from .* has 20, which only can"),
        ({"seq_len": 12, "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 20}, None),
        ({"seq_len": 12}, None),
    ],
)
def test_sizes_other_than_those_of_the_model_to_start_from_are_refused(tmp_path, tiny_recipe, changes, message):
    config = GPT2ScratchConfig(
        vocab_size=300, n_positions=20, n_embd=32, n_layer=1, n_head=2, bos_token_id=299, eos_token_id=299
    )
    GPT2ScratchForCausalLM(config).save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(**{"init_from": str(tmp_path / "model"), "tokens_per_step": 96, **changes})
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message):
        assert build_model(recipe, Vocabulary(300, 299), device_type="cpu").config.n_positions == 20


def test_checkpoint_file_to_start_from_is_refused_with_the_command_that_converts_it(tmp_path, tiny_recipe):
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"ckpt\.pt is a file; convert it with python -m gpt2_scratch\.export --model"):
        build_model(tiny_recipe(init_from=str(tmp_path / "ckpt.pt")), Vocabulary(300, 299), device_type="cpu")
