"""Model folders: ours and official ones, read and written."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import one_thread, pair, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import GPT2LMHeadModel

from gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchModel, modeling_gpt2_scratch


def test_drawing_a_weight_anew_leaves_the_loaded_ones_alone(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    misfit = "transformer.h.1.attn.c_proj.weight"
    save_file(weights | {misfit: torch.zeros(2, 2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items() if name != misfit)
    assert loaded[misfit].std().item() == pytest.approx(0.2 / math.sqrt(6), rel=0.1)


def test_saving_a_loaded_model_gives_the_same_bytes(tmp_path):
    tiny().save_pretrained(tmp_path / "first")
    GPT2ScratchForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    assert {path.name for path in Path(modeling_gpt2_scratch.__file__).parent.glob("*_gpt2_scratch.py")} < set(names)
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize("spelling", ["with prefix", "without prefix and with mask buffers"])
def test_official_folder_loads_with_difference_zero(tmp_path, spelling):
    _, official = pair()
    official.save_pretrained(tmp_path)
    if spelling != "with prefix":
        weights = load_file(tmp_path / "model.safetensors")
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        weights |= {f"h.{i}.attn.bias": torch.ones(48, 48).tril().view(1, 1, 48, 48) for i in range(3)}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, report = GPT2ScratchForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(ours(tokens()).logits, official(tokens()).logits)
    base = GPT2ScratchModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(base(tokens()).last_hidden_state, official.transformer(tokens()).last_hidden_state)


def test_our_weights_load_into_the_official_class(tmp_path):
    ours, official = pair()
    ours.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, config=official.config)
    assert torch.equal(loaded(tokens()).logits, ours(tokens()).logits)
