"""Shards from Hub datasets: the real clients against a server on this machine."""

import io
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.loopback_hub import COMMIT, LoopbackHub, serving
from support.paths import ROOT
from support.small_corpora import make_shards

from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.tokenization.tokenizer import train_bpe

SECRET = "hf_nobodyMayReadThis"


def parquet(texts: list[str | None]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), stream, row_group_size=500)
    return stream.getvalue()


FILES = {
    f"data/train-{i:05d}-of-00003.parquet": parquet([f"file {i} document {j} holds tokens" for j in range(2500)])
    for i in range(3)
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["file document holds tokens"] * 9, 270).save(folder)
    return folder


@pytest.fixture
def prepare(programs: Path, tmp_path: Path, tokenizer_folder: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start the command against the local Hub."""

    def start(hub: LoopbackHub, corpus: str, *flags: str) -> "subprocess.Popen[str]":
        command = [
            str(programs / "python"),
            "-m",
            "training.prepare",
            "--corpus",
            corpus,
            "--output",
            str(tmp_path / "out"),
        ]
        command += ["--tokenizer", str(tokenizer_folder), "--num_workers", "0"]
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": SECRET}
        return subprocess.Popen(
            [*command, *flags], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


def finished(process: "subprocess.Popen[str]", *, exit_code: int = 0) -> str:
    with process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == exit_code, (out, err)
    assert SECRET not in out + err
    return out + err


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.fixture
def expected(tmp_path: Path, tokenizer_folder: Path) -> dict[str, bytes]:
    """The shards of the same rows, read from files."""
    for path, content in FILES.items():
        (tmp_path / "corpus" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / path).write_bytes(content)
    folder = make_shards(
        tmp_path / "expected",
        corpus=str(tmp_path / "corpus"),
        tokenizer=str(tokenizer_folder),
        shard_tokens=20_000,
        val_tokens=5_000,
    )
    return shard_bytes(folder.path)


SIZES = ("--shard_tokens", "20000", "--val_tokens", "5000")


def test_dataset_with_a_text_column_is_read_through_resets_and_server_errors(
    tmp_path: Path, prepare: Callable[..., Any], expected: dict[str, bytes]
) -> None:
    troubled: set[object] = set()

    def trouble(method: str, path: str, number: int) -> int | str | None:
        occasion, what = next(
            (
                (key, what)
                for key, what in (("train-00001", "reset"), ("/api/datasets/org/corpus", 503), ("README", 429))
                if key in path and method == "GET" and key not in troubled
            ),
            (None, None),
        )
        troubled.add(occasion)
        return what

    with serving(LoopbackHub({"org/corpus": FILES | {"README.md": b"---\nlicense: mit\n---\n"}}, trouble)) as hub:
        finished(prepare(hub, "org/corpus", *SIZES))
    assert {"train-00001", "/api/datasets/org/corpus", "README"} <= troubled
    assert shard_bytes(tmp_path / "out") == expected
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert (manifest.corpus, manifest.corpus_revision, manifest.resume) == ("corpus", COMMIT, None)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
def test_killed_stream_resumes_without_reading_earlier_files(
    tmp_path: Path, prepare: Callable[..., Any], expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    slow = True

    def trouble(method: str, path: str, number: int) -> None:
        if slow and "train-00002" in path:
            time.sleep(0.5)

    with serving(LoopbackHub({"org/corpus": FILES}, trouble)) as hub:
        process = prepare(hub, "org/corpus", *SIZES)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            manifest = Manifest.read(out)
            if manifest is not None and manifest.resume is not None and manifest.resume.document >= 2500:
                break  # the stream is in the second file
            time.sleep(0.01)
        process.kill()
        with process:
            process.communicate()
        manifest = Manifest.read(out)
        assert manifest is not None
        assert manifest.resume is not None
        assert manifest.resume.document >= 2500
        assert not manifest.complete
        slow = False
        hub.requests.clear()
        finished(prepare(hub, "org/corpus", *SIZES))
        # The schema of the first file is read again, its rows are not.
        first = [(method, range_) for method, path, range_ in hub.requests if "train-00000" in path and method == "GET"]
        assert not any((range_ or "").startswith("bytes=4-") for _, range_ in first)
    assert shard_bytes(out) == expected


def bin_shard(ids: np.ndarray) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.astype("<u2").tobytes()


def npy_shard(ids: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, ids.astype("<u2"))
    return stream.getvalue()


@pytest.mark.parametrize(("ending", "written"), [("npy", npy_shard), ("bin", bin_shard)])
def test_ready_shards_are_downloaded_in_order_through_a_reset(
    ending: str, written: Callable[[np.ndarray], bytes], tmp_path: Path, prepare: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(0)
    shards = {"val_000000": 3_000, "train_000001": 90_000, "train_000002": 90_000, "train_000003": 50_000}
    ids = {name: rng.integers(0, 270, size) for name, size in shards.items()}
    files = {f"fineweb_{name}.{ending}": written(values) for name, values in ids.items()} | {"README.md": b"x"}
    troubled: list[str] = []

    def trouble(method: str, path: str, number: int) -> str | None:
        if method == "GET" and "train_000001" in path and not troubled:
            troubled.append(path)
            return "reset"
        return None

    with serving(LoopbackHub({"org/shards": files}, trouble)) as hub:
        output = finished(prepare(hub, "org/shards", "--max_tokens", "170000"))
        fetched = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert troubled
    names = [f"fineweb_{name}.{ending}" for name in shards][:3]
    assert list(dict.fromkeys(fetched)) == names  # validation first, and nothing beyond max_tokens
    folder = ShardFolder.open(tmp_path / "out")
    assert folder.complete
    assert [shard.path.name for shard in folder.shards] == names
    for shard, values in zip(folder.shards, ids.values(), strict=False):
        assert np.array_equal(shard.read(), values)
        assert shard.documents == np.count_nonzero(values == 269)
    assert {path.name for path in folder.path.iterdir()} == {
        *names,
        *("manifest.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert "3 shards" in output


def test_ready_shards_of_one_name_in_two_folders_need_a_config(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    files = {
        f"{folder}/x_{split}_00000{number}.npy": npy_shard(np.full(100, ids))
        for ids, folder in enumerate("ab")
        for number, split in enumerate(("val", "train"))
    }
    with serving(LoopbackHub({"org/shards": files})) as hub:
        output = finished(prepare(hub, "org/shards"), exit_code=2)
        assert "two shards of one name: a/x_val_000000.npy and b/x_val_000000.npy; name the folder" in output
        assert not (tmp_path / "out").exists()
        finished(prepare(hub, "org/shards", "--corpus_config", "b"))
    assert all((shard.read() == 1).all() for shard in ShardFolder.open(tmp_path / "out").shards)


def test_max_tokens_counts_training_shards_only(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    names = ("val_000000", "val_000001", "train_000002", "train_000003")
    files = {f"x_{name}.npy": npy_shard(np.full(100, 1)) for name in names}
    with serving(LoopbackHub({"org/shards": files})) as hub:
        finished(prepare(hub, "org/shards", "--max_tokens", "100"))
    assert [shard.split for shard in ShardFolder.open(tmp_path / "out").shards] == ["val", "val", "train"]


def test_ready_shards_of_another_tokenizer_are_an_error(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    files = {f"x_{split}_00000{i}.npy": npy_shard(np.full(100, 270)) for i, split in enumerate(("val", "train"))}
    with serving(LoopbackHub({"org/shards": files})) as hub:
        output = finished(prepare(hub, "org/shards"), exit_code=2)
    assert "the vocabulary has 270 ids" in output
    assert not (tmp_path / "out").exists()


def test_missing_dataset_is_a_one_line_error(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    with serving(LoopbackHub({})) as hub:
        output = finished(prepare(hub, "org/corpus"), exit_code=2)
    assert output.startswith("error: cannot read org/corpus from the Hub (RepositoryNotFoundError")
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()
