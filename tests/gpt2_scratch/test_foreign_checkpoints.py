"""Checkpoint files of other programs: the model that is written computes what they compute, and the rest is refused."""

import argparse
import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from support.foreign_models import (
    BLOCK_SIZE,
    in_main,
    logits,
    save_build_nanogpt,
    save_llmc,
    save_nanogpt,
    save_tensorflow,
    state_dict,
)
from support.model_folders import TRICKY, export, refusal
from support.paths import SHARED_DATA
from transformers import AutoTokenizer, GPT2LMHeadModel

from gpt2_scratch import GPT2ScratchForCausalLM
from gpt2_scratch.tensorflow_checkpoint import read_tensors

IDS = torch.tensor([5, 0, 299, 17, 5, 131, 64, 8, 250, 3])


def logits_of(folder, model_class=GPT2ScratchForCausalLM):
    with torch.no_grad():
        return model_class.from_pretrained(folder, dtype=torch.float32).eval()(IDS[None]).logits[0]


@pytest.mark.parametrize(
    ("bias", "masks", "prefix"),
    [(True, False, ""), (False, False, "_orig_mod."), (True, True, "_orig_mod."), (False, True, "")],
)
def test_nanogpt_checkpoint_keeps_its_logits(tmp_path, tokenizer_folder, capsys, bias, masks, prefix):
    state = state_dict(320, bias=bias, masks=masks, prefix=prefix)
    save_nanogpt(tmp_path / "ckpt.pt", state, bias=bias)
    export(tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", "--tokenizer", str(tokenizer_folder))
    printed = capsys.readouterr().out
    assert "from nanoGPT, activation_function gelu" in printed
    assert "padding of the vocabulary dropped, 320 to 300 tokens" in printed
    assert ("biases set to 0" in printed) is not bias
    found = logits_of(tmp_path / "out", GPT2LMHeadModel)
    torch.testing.assert_close(found, logits(state, IDS, "none")[:, :300], rtol=1e-5, atol=1e-5)
    assert (found - logits(state, IDS, "tanh")[:, :300]).abs().max() > 1e-4  # another activation would show
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["resid_pdrop"]) == (299, 299, 0.1)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == BLOCK_SIZE


def test_build_nanogpt_checkpoint_keeps_its_logits_although_its_config_is_an_object(tmp_path, tokenizer_folder, capsys):
    state = state_dict(320)
    save_build_nanogpt(tmp_path / "model_19072.pt", state)
    export(tmp_path / "model_19072.pt", tmp_path / "out", "gpt2_scratch", "--tokenizer", str(tokenizer_folder))
    assert "from build-nanogpt, activation_function gelu_pytorch_tanh" in capsys.readouterr().out
    expected = logits(state, IDS, "tanh")[:, :300]
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bfloat16")])
def test_llmc_file_keeps_its_logits(tmp_path, tokenizer_folder, version, dtype):
    state = state_dict(300)
    if version == 5:
        state = {name: weight.bfloat16().float() for name, weight in state.items()}
    save_llmc(tmp_path / "model.bin", state, version)
    export(tmp_path / "model.bin", tmp_path / "out", "gpt2_scratch", "--tokenizer", str(tokenizer_folder))
    expected = logits(state, IDS, "tanh")
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert {str(weight.dtype) for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        f"torch.{dtype}"
    }


@pytest.mark.parametrize("name", ["", "model.ckpt.index"])
def test_tensorflow_checkpoint_keeps_its_logits(tmp_path, tokenizer_folder, capsys, name):
    state = state_dict(300)
    save_tensorflow(tmp_path / "124M", state, more={"model/wte/Adam": np.ones((300, 16), "<f4")})
    export(tmp_path / "124M" / name, tmp_path / "out", "gpt2", "--tokenizer", str(tokenizer_folder))
    assert "from TensorFlow, activation_function gelu_new" in capsys.readouterr().out
    expected = logits(state, IDS, "tanh")
    torch.testing.assert_close(logits_of(tmp_path / "out", GPT2LMHeadModel), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.ckpt.index").unlink(), "must hold one TensorFlow checkpoint (.index), found"),
        (lambda folder: (folder / "model.ckpt.data-00000-of-00001").unlink(), "No such file or directory"),
        (
            lambda folder: (folder / "model.ckpt.data-00000-of-00001").write_bytes(b"short"),
            "cannot read the TensorFlow",
        ),
        (lambda folder: (folder / "model.ckpt.index").write_bytes(b"index"), "it is not a table of TensorFlow"),
        (lambda folder: (folder / "hparams.json").write_text("{}"), "has no n_head"),
        (lambda folder: (folder / "hparams.json").write_text("[1]"), "it holds no object"),
        (
            lambda folder: shutil.copy(folder / "model.ckpt.index", folder / "b.index"),
            "found b.index, model.ckpt.index",
        ),
    ],
)
def test_incomplete_tensorflow_checkpoint_is_refused(tmp_path, tokenizer_folder, capsys, damage, message):
    save_tensorflow(tmp_path / "124M", state_dict(300))
    damage(tmp_path / "124M")
    found = refusal(capsys, tmp_path / "124M", tmp_path / "out", "gpt2", "--tokenizer", str(tokenizer_folder))
    assert message in found


def test_flipped_byte_in_a_tensorflow_index_is_an_error_or_harmless(tmp_path):
    save_tensorflow(tmp_path / "124M", state_dict(300))
    path = tmp_path / "124M" / "model.ckpt.index"
    intact = path.read_bytes()
    for offset in range(0, len(intact), 3):
        path.write_bytes(intact[:offset] + bytes([intact[offset] ^ 0x55]) + intact[offset + 1 :])
        with contextlib.suppress(ValueError, OSError):
            list(read_tensors(path))


def test_vocabulary_of_gpt2s_size_brings_gpt2s_tokenizer(tmp_path, monkeypatch):
    cache = SHARED_DATA / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip("needs GPT-2's vocabulary in the shared data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    save_nanogpt(tmp_path / "ckpt.pt", state_dict(50304))
    export(tmp_path / "ckpt.pt", tmp_path / "out", "gpt2")
    saved, original = AutoTokenizer.from_pretrained(tmp_path / "out"), tiktoken.get_encoding("gpt2")
    for text in TRICKY:
        assert saved(text)["input_ids"] == original.encode(text, allowed_special="all")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (50257, 50256)


def test_gpt2s_tokenizer_without_cache_and_network_names_the_ways_out(tmp_path, monkeypatch, capsys):
    def unreachable(*_):
        raise OSError("no route to host")

    monkeypatch.setattr("tiktoken.load.read_file_cached", unreachable)
    save_nanogpt(tmp_path / "ckpt.pt", state_dict(50257))
    message = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out")
    assert "no route to host" in message
    assert "or pass --tokenizer" in message


def test_weights_alone_are_written_on_request(tmp_path, capsys):
    save_nanogpt(tmp_path / "ckpt.pt", state_dict(65))
    message = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out")
    assert "has a vocabulary of 65 tokens, which is not GPT-2's; pass its tokenizer" in message
    export(tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", "--tokenizer", "none")
    assert "without a tokenizer" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*token*"))


def test_head_of_its_own_stays_untied(tmp_path):
    state = state_dict(65) | {"lm_head.weight": torch.ones(65, 16)}
    save_nanogpt(tmp_path / "ckpt.pt", state)
    export(tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", "--tokenizer", "none")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], torch.ones(65, 16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


class RunConfig:
    def __reduce__(self):
        return RunConfig, ({"n_head": 2},)


def save_with(config):
    def save(path):
        torch.save({"model": state_dict(300), "config": config}, path)

    return save


def save_in_main(path):
    with in_main(RunConfig):
        save_with(RunConfig())(path)


def save_changed(**changes):
    return lambda path: save_nanogpt(path, {**state_dict(300), **changes})


def save_without(*names):
    return lambda path: save_nanogpt(path, {name: w for name, w in state_dict(300).items() if name not in names})


def truncated(save, size):
    def save_part(path):
        save(path)
        path.write_bytes(path.read_bytes()[:size])

    return save_part


def llmc(**options):
    return lambda path: save_llmc(path, state_dict(300), **{"version": 3, **options})


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_with(Malicious()), "holds objects that could run code (posix.mkdir); save it again"),
        (save_with(argparse.Namespace(n_head=2)), "could run code (argparse.Namespace)"),
        (save_in_main, "cannot read"),  # an object that is made by a call
        (save_with({"n_layer": 2}), "does not say how many heads the model has"),
        (save_with({"n_head": 3}), "n_embd must be a multiple of n_head"),
        (save_with({"n_head": "two"}), "describes an unsupported model"),
        (lambda path: torch.save(state_dict(300), path), "holds no model of nanoGPT"),
        (lambda path: torch.save([1, 2], path), "holds no model of nanoGPT"),
        (save_without("transformer.wpe.weight", "lm_head.weight"), "no matrix transformer.wpe.weight, so it is not"),
        (save_without("transformer.h.1.ln_2.bias"), "lacks h.1.ln_2.bias (1 in total)"),
        (save_changed(**{"transformer.h.0.attn.q_norm.weight": torch.ones(8)}), "adds h.0.attn.q_norm.weight"),
        (save_changed(**{"transformer.ln_f.weight": torch.ones(3)}), "ln_f.weight in"),
        (save_changed(**{"transformer.ln_f.weight": torch.ones(16).int()}), "is not a dense tensor of floats"),
        (save_changed(**{"transformer.h.0.mlp.c_fc.weight": torch.tensor(1.0)}), "is not a dense tensor of floats"),
        (save_changed(**{"transformer.wpe.weight": torch.ones(8, 16).to_sparse()}), "is not a dense tensor of floats"),
        (save_changed(**{"lm_head.weight": torch.ones(300, 16, device="meta")}), "is not a dense tensor of floats"),
        (truncated(save_changed(), -5000), "as a checkpoint of torch.save"),
        (truncated(save_changed(), 100), "as a checkpoint of torch.save"),
        (llmc(version=3, header={1: 2}), "is of version 2 of llm.c's format; supported are 3 (fp32) and 5 (bf16)"),
        (llmc(header={1: 5}), "but its header describes"),
        (llmc(header={4: 2**31 - 1}), "but its header describes"),
        (llmc(header={6: -16}), "but its header describes"),
        (truncated(llmc(), -4), "it is truncated or corrupted"),
        (truncated(llmc(), 20), "it is truncated or corrupted"),
        (lambda path: path.write_bytes(b""), "is no checkpoint of nanoGPT or build-nanogpt (.pt), llm.c (.bin) or"),
        (lambda path: path.write_text("GGUF, or a text"), "is no checkpoint of nanoGPT"),
        (lambda path: path.write_bytes(b"PK\x03\x04 a zip"), "as a checkpoint of torch.save"),
    ],
)
def test_other_file_is_refused_in_one_line(tmp_path, tokenizer_folder, capsys, monkeypatch, save, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "ckpt.pt")
    found = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", "--tokenizer", str(tokenizer_folder))
    assert message in found
    assert "ckpt.pt" in found


def test_tokenizer_of_another_model_and_tokenizer_of_a_folder_are_refused(tmp_path, tokenizer_folder, capsys):
    save_nanogpt(tmp_path / "ckpt.pt", state_dict(512))
    flags = ("--tokenizer", str(tokenizer_folder))
    message = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", *flags)
    assert "the tokenizer has 300 tokens, but" in message
    message = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", "--tokenizer", str(tmp_path / "nowhere"))
    assert "nowhere is not a folder; pass the folder of a tokenizer" in message
    assert "--tokenizer is for checkpoints of other programs" in refusal(
        capsys, tmp_path, tmp_path / "out", "gpt2", *flags
    )


def test_safetensors_file_names_its_folder(tmp_path, capsys):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    message = refusal(capsys, tmp_path / "model.safetensors", tmp_path / "out")
    assert "pass the folder that also has their config.json" in message


def test_full_disk_while_a_checkpoint_is_converted_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    save_nanogpt(tmp_path / "ckpt.pt", state_dict(65))
    monkeypatch.setattr("gpt2_scratch.foreign_checkpoints.save_file", full)
    message = refusal(capsys, tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", "--tokenizer", "none")
    assert "No space left on device; free some space" in message
