"""The model to train agrees with its tokenizer."""

from pathlib import Path

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from training.data.tokenization.tokenizer import Tokenizer, train_bpe
from training.setup.model import build_model


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
