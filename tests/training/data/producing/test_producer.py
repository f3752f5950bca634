"""The producer: bytes that depend on corpus and tokenizer alone, and resuming after an interruption."""

import json
import random

import numpy as np
import pytest
from support.interrupted import make_interrupted_shards
from support.small_corpora import WORDS, folder_bytes, make_shards, write_corpus

from common.cli_errors import InputError
from training.data.producing import batches
from training.data.shards.shard_reader import ShardFolder
from training.data.tokenization.tokenizer import Tokenizer
from training.data.tokenization.tokenizer_training import train_tokenizer


def _ids(folder: ShardFolder) -> np.ndarray:
    return np.concatenate([shard.read() for shard in folder.shards])


def test_shards_hold_the_documents_in_order_each_after_an_end_of_text(tmp_path, corpus, tokenizer_folder, settings):
    folder = make_shards(tmp_path / "out", **settings)
    tokenizer = Tokenizer.load(tokenizer_folder)
    expected = []
    for line in corpus.read_text().splitlines():
        expected += [tokenizer.end_of_text_id, *tokenizer.encode(json.loads(line)["text"])]
    assert _ids(folder).tolist() == expected
    assert folder.val_shard.tokens == 1_500
    assert {shard.tokens for shard in folder.train_shards[:-1]} == {5_000}
    assert folder.manifest.documents == 400
    assert Tokenizer.load(folder.path).fingerprint == tokenizer.fingerprint
    assert sorted(path.name for path in folder.path.iterdir()) == sorted(
        [*(shard.path.name for shard in folder.shards), "manifest.json", "tokenizer.json", "tokenizer_config.json"]
    )


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", 3_000)  # many batches
    for workers in (0, 1, 2, 4):
        make_shards(tmp_path / str(workers), **{**settings, "num_workers": workers})
    assert (
        folder_bytes(tmp_path / "0")
        == folder_bytes(tmp_path / "1")
        == folder_bytes(tmp_path / "2")
        == folder_bytes(tmp_path / "4")
    )


def test_complete_folder_is_returned_without_writing_to_it(tmp_path, settings):
    path = write_corpus(tmp_path / "c.jsonl", 100)
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "out", **settings)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert make_shards(tmp_path / "out", **settings).complete
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"shard_tokens": 6_000}, "shard_tokens 5000 instead of 6000"),
        ({"val_tokens": 1_000}, "val_tokens 1500 instead of 1000"),
        ({"corpus": "installed-docs"}, "corpus c instead of installed-docs"),
        ({"text_field": "body"}, "text_field text instead of body"),
        ({"tokenizer": "train:400"}, "tokenizer bpe-300 instead of train:400"),
        ({"tokenizer": "gpt2"}, "tokenizer bpe-300 instead of gpt2"),
    ],
)
def test_folder_with_other_settings_is_an_error_that_names_the_difference(tmp_path, settings, change, found):
    make_shards(tmp_path, **settings)
    before = folder_bytes(tmp_path)
    with pytest.raises(InputError, match=f"{found}; request the same, choose another folder, or delete this one"):
        make_shards(tmp_path, **{**settings, **change})
    assert folder_bytes(tmp_path) == before


def test_folder_limited_by_max_tokens_serves_fewer_tokens_and_not_more(tmp_path, settings):
    folder = make_shards(tmp_path, **settings, max_tokens=7_000)
    assert sum(shard.tokens for shard in folder.train_shards) == 7_000
    assert make_shards(tmp_path, **settings, max_tokens=6_000).complete
    for more in (None, 8_000):
        with pytest.raises(InputError, match=f"max_tokens 7000 instead of {more}"):
            make_shards(tmp_path, **settings, max_tokens=more)


def test_marks_separate_documents_and_those_inside_lines_are_reported(tmp_path, settings):
    path = tmp_path / "c.txt"
    path.write_text("\n<|endoftext|>\n".join(["a window of tokens " * 200] * 9) + "\nspelled <|endoftext|> here\n")
    lines: list[str] = []
    folder = make_shards(tmp_path / "out", **{**settings, "corpus": str(path), "report": lines.append})
    assert (folder.manifest.documents, folder.manifest.special_tokens_in_text) == (9, 1)
    assert "the text spells special tokens such as <|endoftext|> 1 times" in lines[-2]
    with pytest.raises(InputError, match=r"document_separator <\|endoftext\|> instead of None"):
        make_shards(tmp_path / "out", **{**settings, "corpus": str(path), "document_separator": None})
    folder = make_shards(tmp_path / "one", **{**settings, "corpus": str(path), "document_separator": None})
    assert (folder.manifest.documents, folder.manifest.special_tokens_in_text) == (1, 9)


def test_manifest_of_a_corpus_without_news_has_the_keys_of_an_earlier_version(tmp_path, settings):
    make_shards(tmp_path, **settings)
    assert list(json.loads((tmp_path / "manifest.json").read_text())) == [
        *("corpus", "corpus_config", "corpus_revision", "text_field", "tokenizer", "tokenizer_fingerprint"),
        *("vocab_size", "end_of_text_id", "dtype", "shard_tokens", "val_tokens", "max_tokens", "complete"),
        *("replaced_documents", "resume", "shards", "format_version"),
    ]


@pytest.mark.parametrize("max_tokens", [None, 21_000])
def test_documents_with_invalid_utf8_are_counted_once(tmp_path, settings, monkeypatch, max_tokens):
    path = tmp_path / "c.jsonl"
    with path.open("wb") as file:
        for number in range(300):
            word = b"caf\xe9" if number % 7 == 0 else b"window"
            file.write(b'{"text": "' + b" ".join([word] * 40) + b'"}\n')
    settings = {**settings, "corpus": str(path), "max_tokens": max_tokens}
    lines: list[str] = []
    for number, characters in enumerate((3_000, 1_000_000)):
        monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", characters)
        make_shards(tmp_path / str(number), **{**settings, "num_workers": number, "report": lines.append})
    make_interrupted_shards(tmp_path / "out", 3, **settings)
    folder = make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "0") == folder_bytes(tmp_path / "1")
    documents = folder.manifest.documents
    assert (documents == 300) == (max_tokens is None)
    assert folder.manifest.replaced_documents == len(range(0, documents, 7))
    assert folder.manifest.replaced_characters == 40 * folder.manifest.replaced_documents
    assert lines[-2] == (  # before the summary
        f"{folder.manifest.replaced_documents:,} documents held invalid UTF-8, which was replaced by U+FFFD: "
        f"{folder.manifest.replaced_characters:,} characters, the first in {path}, row 1: "
        '"caf\ufffd caf\ufffd caf\ufffd caf\ufffd caf"'
    )


def test_document_of_ten_megabytes_is_tokenized(tmp_path, settings):
    path = tmp_path / "c.jsonl"
    long = " ".join(random.Random(0).choices(WORDS, k=1_750_000))
    assert len(long.encode()) > 10_000_000
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("before", long, "x" * 200_000, "after")))
    settings = {**settings, "corpus": str(path), "shard_tokens": 1_000_000, "num_workers": 1}
    folder = make_shards(tmp_path / "out", **settings)
    tokenizer = Tokenizer.load(folder.path)
    assert folder.manifest.documents == 4
    ids = _ids(folder)
    assert tokenizer.decode(ids[-6:].tolist()).endswith("after")
    start, end = np.flatnonzero(ids == tokenizer.end_of_text_id)[1:3]
    assert tokenizer.decode(ids[start + 1 : end].tolist()) == long


# A tokenizer trained on the corpus


def test_trained_tokenizer_is_saved_and_never_saw_validation(tmp_path, settings):
    path = tmp_path / "c.jsonl"
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(300):
            words = ["xylophone"] * 30 if i < 20 else rng.choices(WORDS, k=60)
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    folder = make_shards(
        tmp_path / "out", **{**settings, "corpus": str(path), "tokenizer": "train:290", "val_tokens": 500}
    )
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert folder.manifest.vocab_size == tokenizer.vocab_size == 290
    assert folder.manifest.tokenizer == "bpe-290"
    assert "xylophone" in tokenizer.decode(folder.val_shard.read().tolist())
    assert not any("xyl" in tokenizer.decode([i]) for i in range(290))


def test_more_characters_are_reserved_if_validation_is_longer(tmp_path, settings, monkeypatch):
    monkeypatch.setattr("training.data.tokenization.tokenizer_training._RESERVED_CHARACTERS_PER_TOKEN", 1)
    lines: list[str] = []
    make_shards(tmp_path / "out", **{**settings, "tokenizer": "train:300", "report": lines.append})
    assert len([line for line in lines if "training a vocabulary" in line]) > 1


def test_single_document_is_divided_between_validation_and_tokenizer_training(tmp_path, settings):
    path = tmp_path / "c.txt"
    path.write_text("xylophone " * 400 + " ".join(WORDS * 300))
    settings = {**settings, "corpus": str(path), "tokenizer": "train:290", "val_tokens": 600, "shard_tokens": 1000}
    make_shards(tmp_path / "out", **settings)
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert not any("xylo" in tokenizer.decode([i]) for i in range(290))


def test_corpus_without_text_after_validation_is_an_error(tmp_path, corpus, settings):
    from training.data.sources.open_corpus import open_corpus

    with pytest.raises(InputError, match="nothing is left to train a tokenizer on"):
        train_tokenizer(open_corpus(str(corpus)), 300, val_tokens=1_000_000, report=lambda line: None)
