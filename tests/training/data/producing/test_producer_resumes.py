"""A producer that was interrupted or killed resumes, and its shards are the same."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.interrupted import make_interrupted_shards
from support.paths import ROOT
from support.small_corpora import WORDS, folder_bytes, make_shards, write_corpus

from common.cli_errors import InputError
from training.data.producing import batches, producer
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.sources import pieces
from training.data.sources.files import FileCorpus


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_interrupted_producer_resumes_to_the_same_bytes(tmp_path, settings, shards):
    make_shards(tmp_path / "complete", **settings)
    make_interrupted_shards(tmp_path / "out", shards, **settings)
    assert len(ShardFolder.open(tmp_path / "out").shards) == shards
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_producer_resumes_in_the_middle_of_a_document(tmp_path, settings):
    path = tmp_path / "c.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=20_000)))
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "complete", **settings)
    make_interrupted_shards(tmp_path / "out", 3, **settings)
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_resuming_inside_a_document_reads_only_its_rest(tmp_path, settings, monkeypatch):
    path = tmp_path / "c.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=60_000)) + "\n<|endoftext|>\n" + "window of loss " * 900)
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 2_000)
    monkeypatch.setattr(batches, "CHARACTERS_PER_BATCH", 4_000)
    settings = {**settings, "corpus": str(path)}
    make_shards(tmp_path / "complete", **settings)
    make_interrupted_shards(tmp_path / "out", 6, **settings)
    resume = Manifest.read(tmp_path / "out").resume
    assert (resume.document, resume.place[3]) == (0, 1)
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
    make_interrupted_shards(tmp_path / "out", 3, **settings)
    file = tmp_path / "out" / "manifest.json"
    data = json.loads(file.read_text())
    if name == "c.txt":  # it kept the document's beginning
        data["resume"] = {"document": 0, "place": [0, 0, 0]}
    else:
        assert data["resume"]["document"] > 0
        del data["resume"]["tokens"], data["resume"]["sha256"]
    file.write_text(json.dumps(data))
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")


def test_partial_folder_is_not_resumed_with_a_changed_corpus(tmp_path, settings, monkeypatch):
    path = write_corpus(tmp_path / "c.jsonl", 200)
    settings = {**settings, "corpus": str(path)}
    make_interrupted_shards(tmp_path / "out", 2, **settings)
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
    make_interrupted_shards(tmp_path / "out", 4, **settings)
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


def test_resumed_producer_keeps_the_trained_tokenizer(tmp_path, settings, monkeypatch):
    settings = {**settings, "tokenizer": "train:300"}
    make_shards(tmp_path / "complete", **settings)
    make_interrupted_shards(tmp_path / "out", 2, **settings)
    monkeypatch.setattr(producer, "train_tokenizer", None)  # training again would fail
    make_shards(tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "complete")
