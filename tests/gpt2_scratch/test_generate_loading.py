"""What generate refuses to load, and how it says so."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.generating import folder, generate, refusal  # noqa: F401 - fixtures
from support.model_folders import change_json
from transformers import BertConfig, BertForMaskedLM

from common.cli_errors import InputError
from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchForTokenClassification,
)
from gpt2_scratch.generate import load


def test_missing_folder_is_refused(tmp_path, capsys):
    message = refusal(capsys, "--model", tmp_path / "nothing", "--prompt", "a")
    assert "there is no folder" in message
    assert len(message.splitlines()) == 1


def test_checkpoint_file_is_refused_with_the_command_that_converts_it(tmp_path, capsys):
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    message = refusal(capsys, "--model", tmp_path / "ckpt.pt", "--prompt", "a")
    assert "ckpt.pt' is a file; convert it with python -m gpt2_scratch.export --model" in message


def test_folder_without_a_model_is_refused(tmp_path, capsys):
    message = refusal(capsys, "--model", tmp_path, "--prompt", "a")
    assert "cannot load a causal language model from" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("model_type", ["gpt2_scratch", "gpt2"])  # transformers makes an empty tokenizer for gpt2
def test_folder_without_a_tokenizer_is_refused(folder, tmp_path, capsys, model_type):
    GPT2ScratchForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", model_type=model_type)
    capsys.readouterr()
    message = refusal(capsys, "--model", tmp_path, "--prompt", "a")
    assert "cannot load a tokenizer from" in message
    assert "tokenizer.json is missing" in message
    assert len(message.splitlines()) == 1


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_the_vocabulary(folder):
    model = GPT2ScratchForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(50, mean_resizing=False)
    model.config.bos_token_id = model.config.eos_token_id = 1
    model.save_pretrained(folder)


def corrupt_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def misfit(folder):
    change_config(folder, n_positions=48)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt2_scratch"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_weights, "cannot load a causal language model from"),
        (lambda folder: change_config(folder, n_layer="two"), "'n_layer': .*expected int, got str"),
        (lambda folder: change_config(folder, dtype="floaty"), "floaty"),
        (lambda folder: change_config(folder, attn_implementation="flash_attention_2"), "(?i)flash"),
        (misfit, r"do not fit its config.json: transformer.wpe.weight \(1 in total\)"),
        (lose_a_weight, r"transformer.ln_f.bias \(1 in total\)"),
        (corrupt_a_weight, "weights hold NaN or infinity; use an earlier checkpoint"),
        (shrink_the_vocabulary, "but the model's vocabulary has 50 tokens"),
    ],
)
def test_unusable_folder_gives_a_one_line_error(folder, tmp_path, capsys, model_type, damage, message):
    if "flash" in message and torch.cuda.is_available():
        pytest.skip("with a GPU this depends on the installed packages")
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")
    change_config(tmp_path / "model", model_type=model_type, auto_map={})
    capsys.readouterr()
    found = refusal(capsys, "--model", tmp_path / "model", "--prompt", "a", "--device", "cpu")
    assert len(found.splitlines()) == 1, found
    assert re.search(message, found), found


def test_model_that_is_not_causal_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=257, initializer_range=0.5, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    found = refusal(capsys, "--model", tmp_path / "bert", "--prompt", "a", "--device", "cpu")
    assert "not a causal language model: its predictions depend on later tokens" in found.splitlines()[-1]


@pytest.mark.parametrize(
    "model_class",
    [GPT2ScratchForSequenceClassification, GPT2ScratchForTokenClassification, GPT2ScratchForQuestionAnswering],
)
def test_model_with_another_head_is_refused(folder, tmp_path, capsys, model_class):
    shutil.copytree(folder, tmp_path / "model")
    model_class(GPT2ScratchConfig.from_pretrained(folder)).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    found = refusal(capsys, "--model", tmp_path / "model", "--prompt", "a", "--device", "cpu")
    assert f"is a {model_class.__name__}, not a language model; use the model it was tuned from" in found


def test_a_revision_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match="is a folder, which has no revisions; omit --revision"):
        load(str(folder), "cpu", revision="main")
