"""Loading and saving model folders, ours and official ones."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from support.tiny_models import one_thread, pair, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import GPT2LMHeadModel

from gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchModel, modeling_gpt2_scratch

pytestmark = pytest.mark.parity


def test_initializing_a_mismatched_weight_keeps_the_loaded_ones(tmp_path):
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
def test_official_folder_loads_silently_with_equal_logits(tmp_path, spelling, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
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
    assert caplog.text == ""
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


def test_sharded_safetensors_load(tmp_path):
    model, official = pair()
    official.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path / "ours", max_shard_size="40KB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert all((tmp_path / "ours" / name).read_bytes() == (tmp_path / name).read_bytes() for name in shards)


def test_bfloat16_weights_load_unchanged_or_in_the_requested_dtype(tmp_path):
    model, official = pair()
    official.bfloat16().save_pretrained(tmp_path)
    for options, dtype in (({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32)):
        loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path, **options).state_dict()
        assert {weight.dtype for weight in loaded.values()} == {dtype}
        assert all(
            torch.equal(loaded[name], weight.bfloat16().to(dtype)) for name, weight in model.state_dict().items()
        )


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_head_is_tied_if_the_official_config_requires_it(tmp_path, tie_word_embeddings):
    _, official = pair(tie_word_embeddings=tie_word_embeddings)
    official.save_pretrained(tmp_path)
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tie_word_embeddings
    assert torch.equal(loaded(tokens()).logits, official(tokens()).logits)


def test_loading_initializes_nothing_and_allocates_weights_once(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    devices = []

    def watch(self, config, original=GPT2ScratchModel.__init__):
        original(self, config)
        devices.extend(parameter.device.type for parameter in self.parameters())

    monkeypatch.setattr(GPT2ScratchModel, "__init__", watch)
    model = GPT2ScratchForCausalLM.from_pretrained(tmp_path)
    assert set(devices) == {"meta"}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map_places_the_model(tmp_path, device_map):
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path, device_map=device_map, attn_implementation="eager")
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    assert {parameter.device.type for parameter in loaded.parameters()} == {expected}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    torch.testing.assert_close(loaded(tokens().to(expected)).logits.cpu(), model(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_blocks_offloaded_to_disk_are_read_when_needed(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    device_map = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"}
    device_map |= {"transformer.h.0": "cpu", "transformer.h.1": "disk", "transformer.h.2": "disk"}
    loaded = GPT2ScratchForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk", attn_implementation="eager"
    )
    assert loaded.transformer.h[2].mlp.c_fc.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_model_is_pushed_to_the_hub_with_its_code(monkeypatch):
    created, uploaded = [], []

    def create_repo(*arguments, **_):
        created.append(arguments[-1])
        return SimpleNamespace(repo_id=arguments[-1])

    def upload(self, working_dir, repo_id, *_, **__):
        uploaded.append((repo_id, {path.name for path in Path(working_dir).iterdir()}))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr("transformers.utils.hub.create_repo", create_repo, raising=False)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("---\nlicense: mit\n---\n")
    )
    monkeypatch.setattr(GPT2ScratchForCausalLM, "_upload_modified_files", upload)
    tiny().push_to_hub("someone/tiny")
    assert created == ["someone/tiny"]
    ((repo_id, names),) = uploaded
    assert repo_id == "someone/tiny"
    assert {"config.json", "model.safetensors", "modeling_gpt2_scratch.py", "pretrained_gpt2_scratch.py"} <= names
