"""Tokenizers of models on the Hub: their ids, and what a run keeps of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.loopback_hub import LoopbackHub
from support.loopback_repository import Repository
from support.small_corpora import make_shards
from support.tiny_models import tiny
from transformers import AutoTokenizer, GPT2Tokenizer

from common.cli_errors import InputError
from training.data.tokenization.tokenizer import load_tokenizer, train_bpe
from training.loop import train
from training.recipe import Recipe

Make = Callable[..., Recipe]
TEXT = "some words of the model, and it's the second line: 12 tokens, naïve café数学 don't they?\n\n  A new one. " * 9


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def official(folder: Path) -> dict[str, bytes]:
    """As in openai-community/gpt2: its tokenizer_config.json names no tokens."""
    train_bpe([TEXT], 300).save(folder)
    return files_of(folder) | {
        "tokenizer_config.json": b'{"model_max_length": 1024}',
        "config.json": b'{"model_type": "gpt2", "bos_token_id": 299, "eos_token_id": 299}',
    }


def vocabulary_and_merges(folder: Path) -> dict[str, bytes]:
    files = official(folder)
    model = json.loads(files["tokenizer.json"])["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"])])
    return {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()} | {
        "config.json": files["config.json"]
    }


def chat(folder: Path) -> dict[str, bytes]:
    """With another end of text, a pad token, a further special token and a chat template."""
    train_bpe([TEXT], 300).save(folder)
    data = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|end|>")
    (folder / "tokenizer.json").write_text(data)
    tokenizer = GPT2Tokenizer.from_pretrained(folder, eos_token="<|end|>", bos_token="<|end|>", unk_token="<|end|>")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = "{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return files_of(folder)


@pytest.mark.parametrize("make", [official, vocabulary_and_merges, chat])
def test_the_tokenizer_of_a_model_on_the_hub_gives_the_ids_of_auto_tokenizer(
    make: Callable[[Path], dict[str, bytes]], hub: LoopbackHub, tmp_path: Path
) -> None:
    files = make(tmp_path / "made")
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    expected = AutoTokenizer.from_pretrained(tmp_path / "files")
    hub.repositories["model", "them/model"] = Repository({**files, "model.safetensors": b"x" * 1000})
    tokenizer = load_tokenizer("them/model")
    tokenizer.save(tmp_path / "saved")
    found = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.encode(TEXT) == expected(TEXT)["input_ids"] == found(TEXT)["input_ids"]
    assert found.eos_token_id == expected.eos_token_id == tokenizer.end_of_text_id
    assert (found.pad_token, found.chat_template) == (expected.pad_token, expected.chat_template)
    assert found.all_special_tokens == expected.all_special_tokens
    assert not [path for _, path, _ in hub.requests if "safetensors" in path]


def test_a_dataset_of_shards_comes_before_a_model_of_its_name(hub: LoopbackHub, tmp_path: Path) -> None:
    for kind, size in (("dataset", 280), ("model", 300)):
        train_bpe([TEXT], size).save(tmp_path / kind)
        hub.repositories[kind, "me/both"] = Repository(files_of(tmp_path / kind))
        hub.repositories[kind, "me/same-name"] = Repository(files_of(tmp_path / kind))
    hub.repositories["dataset", "me/same-name"] = Repository({"data.jsonl": b"{}"})
    assert load_tokenizer("me/both").vocab_size == 280
    assert load_tokenizer("me/same-name").vocab_size == 300


def test_a_run_keeps_the_tokenizer_of_a_model_on_the_hub(
    hub: LoopbackHub,
    tiny_recipe: Make,
    text_file: Path,
    tmp_path: Path,
    impatient: None,
    fresh_accelerator: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    files = chat(source)
    vocabulary = AutoTokenizer.from_pretrained(source)
    tiny(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=None).save_pretrained(source)
    hub.repositories["model", "them/chat"] = Repository(files_of(source) | files)
    shards = {"corpus": str(text_file), "shard_tokens": 9_000, "val_tokens": 2_000, "tokenizer": "them/chat"}
    make_shards(tmp_path / "shards", **shards, num_workers=0)
    # Complete shards are trained on where the Hub is down, and one line says so.
    hub.trouble = lambda method, path, number: "down" if "/datasets/" in path or "/models/" in path else None
    settings = {**shards, "data_dir": str(tmp_path / "shards"), "init_from": str(source), "max_steps": 1}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    train(tiny_recipe(**settings, eval_steps=0, sample_steps=0, output_dir=str(tmp_path / "run")))
    report = capsys.readouterr().out
    assert f"{tmp_path / 'shards'} was not compared with its tokenizer: no tokenizer them/chat" in report
    model = tmp_path / "run" / "model"
    saved = AutoTokenizer.from_pretrained(model)
    assert saved(TEXT)["input_ids"] == vocabulary(TEXT)["input_ids"]
    assert (saved.eos_token, saved.pad_token) == ("<|end|>", "<|pad|>")
    assert saved.chat_template == vocabulary.chat_template
    assert saved.all_special_tokens == vocabulary.all_special_tokens
    ids = {"bos_token_id": 299, "eos_token_id": 299, "pad_token_id": vocabulary.pad_token_id}
    for name in ("config.json", "generation_config.json"):
        assert ids.items() <= json.loads((model / name).read_text()).items()


@pytest.mark.parametrize("name", ["a/b..c", "my tok/x", "owner/name@main", "x/"])
def test_a_name_that_no_repository_can_have_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match=r"no tokenizer .*no model or dataset on the Hub that has one.*check the name"):
        load_tokenizer(name)


def test_a_hub_model_without_a_tokenizer_is_an_error(hub: LoopbackHub) -> None:
    hub.repositories["model", "them/bare"] = Repository({"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(InputError, match=r"no tokenizer them/bare: .*no model or dataset on the Hub that has one"):
        load_tokenizer("them/bare")
