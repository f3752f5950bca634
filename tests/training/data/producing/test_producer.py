"""The producer: bytes that depend on corpus and tokenizer alone, and resuming after an interruption."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.paths import ROOT
from support.small_corpora import WORDS, folder_bytes, make_shards, write_corpus

from common.atomic_files import PARTIAL_SUFFIX
from common.cli_errors import InputError
from training.data.producing import batches, producer
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_writer import ShardWriter
from training.data.sources import pieces
from training.data.sources.files import FileCorpus
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


class _KilledError(Exception):
    pass


def _interrupt_after(monkeypatch, shards: int) -> None:
    """Make the producer die after `shards` shards and leave the files that a kill would leave."""
    real = ShardWriter._write_shard

    def write_shard(self) -> None:
        if len(self.manifest.shards) == shards:
            (self._folder / f"c_train_{shards:06d}.npy{PARTIAL_SUFFIX}").write_bytes(b"half")
            (self._folder / f"c_train_{shards:06d}.npy").write_bytes(b"complete, but not in the manifest")
            raise _KilledError
        real(self)

    monkeypatch.setattr(ShardWriter, "_write_shard", write_shard)
    monkeypatch.setattr(producer, "removing_partial_files", contextlib.nullcontext)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_interrupted_producer_resumes_to_the_same_bytes(tmp_path, settings, monkeypatch, shards):
    make_shards(tmp_path / "complete", **settings)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, shards)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    assert len(ShardFolder.open(tmp_path / "out").shards) == shards
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_producer_resumes_in_the_middle_of_a_document(tmp_path, settings, monkeypatch):
    path = tmp_path / "c.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=20_000)))
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "complete", **settings)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 3)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_resuming_inside_a_document_reads_only_its_rest(tmp_path, settings, monkeypatch):
    path = tmp_path / "c.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=60_000)) + "\n<|endoftext|>\n" + "window of loss " * 900)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 2_000)
    monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", 4_000)
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "complete", **settings)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 6)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    resume = Manifest.read(tmp_path / "out").resume
    assert (resume.document, resume.position[3]) == (0, 1)
    read, real = [], FileCorpus._read

    def spy(self, start):
        for piece in real(self, start):
            read.append(piece.text)
            yield piece

    monkeypatch.setattr(FileCorpus, "_read", spy)
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")
    assert "".join(read) == path.read_text().replace("\n<|endoftext|>\n", "")[-len("".join(read)) :]
    assert 30_000 < len("".join(read)) < 300_000


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_folder_that_an_earlier_version_began_is_resumed(tmp_path, settings, monkeypatch, name):
    path = write_corpus(tmp_path / "c.jsonl", 400)
    if name == "c.txt":
        path = tmp_path / name
        path.write_text(" ".join(random.Random(0).choices(WORDS, k=60_000)))
    settings = {**settings, "corpus": str(path)}
    monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", 4_000)
    make_shards(tmp_path / "complete", **settings)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 3)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    file = tmp_path / "out" / "manifest.json"
    data = json.loads(file.read_text())
    if name == "c.txt":  # it kept the document's beginning
        data["resume"] = {"document": 0, "place": [0, 0, 0]}
    else:
        assert data["resume"]["document"] > 0
        del data["resume"]["tokens"]
    file.write_text(json.dumps(data))
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


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


def test_partial_folder_is_not_resumed_with_a_changed_corpus(tmp_path, settings, monkeypatch):
    path = write_corpus(tmp_path / "c.jsonl", 200)
    settings = {**settings, "corpus": str(path)}
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    write_corpus(path, 200, seed=1)
    with pytest.raises(InputError, match=r"'c' has changed since .* delete the folder"):
        make_shards(tmp_path / "out", **settings)
    monkeypatch.setattr(FileCorpus, "revision", Manifest.read(tmp_path / "out").corpus_revision)
    with pytest.raises(InputError, match="the corpus has changed"):
        make_shards(tmp_path / "out", **settings)


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet", "c"])
def test_producer_resumes_without_reading_earlier_documents(tmp_path, settings, monkeypatch, name):
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 300]))) for _ in range(400)]
    path = tmp_path / name
    if name == "c.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10)
    elif name == "c.jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:03d}.txt").write_text(text)
    monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", 2_000)
    settings = {**settings, "corpus": str(path)}
    complete = make_shards(tmp_path / "complete", **settings)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.resume.document < manifest.documents <= manifest.resume.document + 30

    read, real = [], FileCorpus._read

    def spy(self, start):
        for document in real(self, start):
            read.append(document)
            yield document

    monkeypatch.setattr(FileCorpus, "_read", spy)
    make_shards(tmp_path / "out", **settings)
    assert len(read) == 400 - manifest.resume.document
    assert folder_bytes(tmp_path / "out") == folder_bytes(complete.path)


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
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 3)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
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


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_producer_leaves_no_process_and_resumes_to_the_same_bytes(tmp_path, settings):
    path = write_corpus(tmp_path / "c.jsonl", 4_000)
    settings = {**settings, "corpus": str(path), "shard_tokens": 20_000}
    make_shards(tmp_path / "complete", **settings)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "training.prepare", "--output", str(out), "--num_workers", "1"]
    for name in ("corpus", "tokenizer", "shard_tokens", "val_tokens"):
        command += [f"--{name}", str(settings[name])]
    killed_with = []
    for wanted in (0, 1, 4):  # shards on disk when it is killed
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                manifest = Manifest.read(out)
                if manifest is not None and len(manifest.shards) >= wanted and (children := _children(process.pid)):
                    break
                time.sleep(0.002)
            else:
                pytest.fail(f"ended by itself with {process.returncode}")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        killed_with.append(len(Manifest.read(out).shards))
        deadline = time.monotonic() + 20
        while any(map(_is_alive, children)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(_is_alive, children))
    assert not Manifest.read(out).complete, killed_with
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert folder_bytes(out) == folder_bytes(tmp_path / "complete")


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


def test_resumed_producer_keeps_the_trained_tokenizer(tmp_path, settings, monkeypatch):
    settings = {**settings, "tokenizer": "train:300"}
    make_shards(tmp_path / "complete", **settings)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2)
        with pytest.raises(_KilledError):
            make_shards(tmp_path / "out", **settings)
    monkeypatch.setattr(producer, "train_tokenizer", None)  # training again would fail
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_corpus_without_text_after_validation_is_an_error(tmp_path, corpus, settings):
    from training.data.sources.open_corpus import open_corpus

    with pytest.raises(InputError, match="nothing is left to train a tokenizer on"):
        train_tokenizer(open_corpus(str(corpus)), 300, val_tokens=1_000_000, report=lambda line: None)
