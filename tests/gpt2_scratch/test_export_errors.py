"""Unusual model folders: those that cannot be exported give a one-line error, the others are exported."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_folders import SIZES, change_config, export, refusal, save, scratch  # noqa: F401 - a fixture

from common.cli_errors import InputError, run_command
from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from gpt2_scratch.generate import load


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu_nwe"}, "did you mean 'gelu_new'"),
        ({"rotary_dim": 64}, "unknown key 'rotary_dim'"),
        ({"dtype": "floaty"}, "floaty"),
        ({"id2label": "cat"}, "describes an unsupported model"),
        ({"architectures": "GPT2LMHeadModel"}, "architecture"),
        ({"architectures": [["GPT2LMHeadModel"]]}, "architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config"),
    ],
)
def test_invalid_config_is_refused(scratch, tmp_path, capsys, changes, message):
    shutil.copytree(scratch, tmp_path / "model")
    change_config(tmp_path / "model", **changes)
    found = refusal(capsys, tmp_path / "model", tmp_path / "native")
    assert re.search(message, found), found


def make_config_a_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def change_weights(folder, **changes):
    path = folder / "model.safetensors"
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def repeat_a_weight(folder):
    change_weights(folder, **{"ln_f.bias": torch.ones(24)})


def quantize_a_weight(folder):
    change_weights(folder, **{"transformer.ln_f.bias": torch.ones(24, dtype=torch.int8)})


def with_index(text):
    def damage(folder):
        (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def _naming(file):
    return json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": file}})


BROKEN_INDEX = {
    "": "has no valid weight_map",
    "[]": "has no valid weight_map",
    "{}": "has no valid weight_map",
    "[" * 100_000: "nested too deeply",
    '{"metadata": {"total_size": ' + "9" * 5000: "has no valid weight_map",
    '{"metadata": {}, "weight_map": {}}': "lists no files",
    _naming(["a"]): "has no valid weight_map",
    _naming(1): "lists the shard 1, which is missing",
    _naming("no.safetensors"): "lists the shard 'no.safetensors', which is missing",
    _naming("../other.safetensors"): "lists the shard '../other.safetensors', which is missing",
    _naming("x\0"): r"lists the shard 'x\x00', which is missing",
    _naming("x" * 300): "which is missing",
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (make_config_a_folder, "Is a directory"),
        (repeat_a_weight, "ln_f.bias twice"),
        (quantize_a_weight, "has dtype I8"),
        *((with_index(text), reason) for text, reason in BROKEN_INDEX.items()),
    ],
)
def test_folder_with_invalid_weights_is_refused(scratch, tmp_path, capsys, damage, message):
    shutil.copytree(scratch, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refusal(capsys, tmp_path / "model", tmp_path / "native")


@pytest.mark.parametrize("text", BROKEN_INDEX)
def test_no_weights_are_loaded_by_a_broken_index(scratch, tmp_path, text):
    shutil.copytree(scratch, tmp_path / "model")
    with_index(text)(tmp_path / "model")
    with pytest.raises(InputError, match=re.escape(BROKEN_INDEX[text])):
        load(str(tmp_path / "model"), "cpu")


def test_setting_that_the_hubs_client_cannot_use_is_one_line(tmp_path, capsys, monkeypatch):
    def download(*arguments, **settings):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr("gpt2_scratch.source_folder.snapshot_download", download)
    assert "Using SOCKS proxy, but" in refusal(capsys, "openai-community/gpt2", tmp_path / "native")


def test_path_with_a_nul_is_refused(scratch, tmp_path, capsys):
    assert "contains a NUL character" in refusal(capsys, scratch, tmp_path / "na\0tive")


def test_failed_export_creates_no_parent_folders(tmp_path, capsys):
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig(**SIZES))
    model.transformer.wte.weight.data[3, 4] = 1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        run_command(lambda: export(tmp_path / "model", tmp_path / "a" / "b" / "half", "gpt2", "--dtype", "float16"))
    assert "too large for torch.float16" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(tmp_path / "model", tmp_path / "a" / "b" / "complete", "gpt2")
    assert (tmp_path / "a" / "b" / "complete" / "config.json").exists()


def test_attention_implementation_need_not_be_installed(scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / "model")
    change_config(tmp_path / "model", attn_implementation="flash_attention_2")
    export(tmp_path / "model", tmp_path / "native", "gpt2")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["attn_implementation"] == "flash_attention_2"


def test_card_that_is_not_utf8_and_index_without_metadata_are_copied(tmp_path):
    save(GPT2ScratchForCausalLM, tmp_path / "model", {"max_shard_size": "30KB"})
    (tmp_path / "model" / "README.md").write_bytes(b"caf\xe9, trust_remote_code=True\n")
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": None}))
    export(tmp_path / "model", tmp_path / "native", "gpt2", "--dtype", "bfloat16")
    assert (tmp_path / "native" / "README.md").read_bytes() == b"caf\xe9\n"
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 21_432 * 2}


@pytest.mark.parametrize("flags", [(), ("--dtype", "bfloat16")])
def test_full_disk_leaves_nothing(scratch, tmp_path, capsys, flags):
    # A limit on the size of files fails a write as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = refusal(capsys, scratch, tmp_path / "native", "gpt2", *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write {tmp_path / 'native'}: " in message
    assert "File too large" in message
    assert message.endswith("; free some space, and run the command again\n")
    assert list(tmp_path.iterdir()) == []


def test_permission_error_names_the_file_and_says_nothing_of_space(scratch, tmp_path, capsys, monkeypatch):
    refused = 0  # the source

    def refuse(*paths, **settings):
        raise PermissionError(13, "Permission denied", str(paths[refused]))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    advice = "Permission denied; change its permissions, or choose another path\n"
    assert refusal(capsys, scratch, tmp_path / "native").endswith(f"model.safetensors cannot be used: {advice}")
    refused = 1
    assert refusal(capsys, scratch, tmp_path / "native").endswith(f"cannot write {tmp_path / 'native'}: {advice}")


def test_weights_that_may_not_be_read_are_not_called_missing(scratch, tmp_path, capsys, monkeypatch):
    real = Path.open

    def refuse(path, *arguments, **settings):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    refused = f"{scratch / 'model.safetensors'} cannot be used: Permission denied; change its permissions"
    assert refused in refusal(capsys, scratch, tmp_path / "native")
    with pytest.raises(PermissionError):
        load(str(scratch), "cpu")
