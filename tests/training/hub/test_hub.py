"""Corpora from the Hub: its real clients against a server on this machine."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.fake_clock import Clock
from support.loopback_hub import COMMIT, LoopbackHub, serving
from support.paths import ROOT
from support.small_corpora import make_shards

from common.cli_errors import InputError
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.sources.hub_corpus import HubCorpus
from training.data.sources.open_corpus import open_corpus
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
def prepare(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start the command as a user does, against a Hub on this machine."""

    def start(hub: LoopbackHub, corpus: str, *flags: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "training.prepare", "--corpus", corpus, "--output", str(tmp_path / "out")]
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


def test_any_dataset_with_a_text_column_is_a_corpus_through_resets_and_refusals(
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
def test_killed_stream_goes_on_by_its_files(
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
                break  # it is in the second file
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
        # A look at the first file's schema; its rows are not read again.
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
def test_ready_shards_are_downloaded_in_order_and_go_on_after_a_reset(
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
        told = finished(prepare(hub, "org/shards", "--max_tokens", "170000"))
        fetched = [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert troubled
    names = [f"fineweb_{name}.{ending}" for name in shards][:3]
    assert list(dict.fromkeys(fetched)) == names  # validation first, and no more than was asked for
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
    assert "3 shards" in told


def test_ready_shards_of_one_name_in_two_folders_are_refused_unless_one_is_named(
    tmp_path: Path, prepare: Callable[..., Any]
) -> None:
    files = {
        f"{folder}/x_{split}_00000{number}.npy": npy_shard(np.full(100, ids))
        for ids, folder in enumerate("ab")
        for number, split in enumerate(("val", "train"))
    }
    with serving(LoopbackHub({"org/shards": files})) as hub:
        told = finished(prepare(hub, "org/shards"), exit_code=2)
        assert "two shards of one name: a/x_val_000000.npy and b/x_val_000000.npy; name the folder" in told
        assert not (tmp_path / "out").exists()
        finished(prepare(hub, "org/shards", "--corpus_config", "b"))
    assert all((shard.read() == 1).all() for shard in ShardFolder.open(tmp_path / "out").shards)


def test_limit_of_tokens_counts_training_shards_only(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    names = ("val_000000", "val_000001", "train_000002", "train_000003")
    files = {f"x_{name}.npy": npy_shard(np.full(100, 1)) for name in names}
    with serving(LoopbackHub({"org/shards": files})) as hub:
        finished(prepare(hub, "org/shards", "--max_tokens", "100"))
    assert [shard.split for shard in ShardFolder.open(tmp_path / "out").shards] == ["val", "val", "train"]


def test_ready_shards_of_another_tokenizer_are_refused(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    files = {f"x_{split}_00000{i}.npy": npy_shard(np.full(100, 270)) for i, split in enumerate(("val", "train"))}
    with serving(LoopbackHub({"org/shards": files})) as hub:
        told = finished(prepare(hub, "org/shards"), exit_code=2)
    assert "the vocabulary has 270 ids" in told
    assert not (tmp_path / "out").exists()


def test_dataset_that_is_not_there_is_one_line(tmp_path: Path, prepare: Callable[..., Any]) -> None:
    with serving(LoopbackHub({})) as hub:
        told = finished(prepare(hub, "org/corpus"), exit_code=2)
    assert told.startswith("error: cannot read org/corpus from the Hub (RepositoryNotFoundError")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# The rows of a stream, on a clock of our own


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubCorpus:
    """A Hub corpus whose stream is a real one, over a file here, on a clock of our own."""
    (tmp_path / "rows.parquet").write_bytes(parquet([None if i % 97 == 0 else f"row {i}" for i in range(4000)]))
    real = datasets.load_dataset_builder

    def load_dataset_builder(repository: str, **arguments: Any) -> Any:
        if arguments["name"] not in (None, "sample-10BT"):
            raise ValueError("BuilderConfig 'x' not found. Available: ['default', 'sample-10BT']")
        path = str(tmp_path / "rows.parquet")
        return real("parquet", data_files=path, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return hub_corpus("org/rows")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("common.hub_retry.time", clock)
    return clock


def hub_corpus(repository: str, config: str | None = None) -> HubCorpus:
    corpus = HubCorpus(repository, config, name="rows", text_field="text", report=lambda line: None)
    corpus.revision = COMMIT
    return corpus


def test_stream_goes_on_from_the_places_that_it_names(rows: HubCorpus) -> None:
    documents = list(rows.read())
    assert len(documents) == 4000 - 42
    places = [number for number, document in enumerate(documents) if document.position is not None]
    assert len(places) >= 3
    for number in places:
        assert [document.text for document in rows.read(documents[number].position)] == [
            document.text for document in documents[number:]
        ]


@pytest.mark.parametrize("lost_at", [3, 1003, 2500])
def test_stream_that_is_lost_goes_on_with_the_next_row(
    rows: HubCorpus, lost_at: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(rows.documents())
    real = HubCorpus._rows
    losses, delivered = [lost_at, lost_at, lost_at + 700], [0]

    def losing(self: HubCorpus, state: Any, *, skipped: int) -> Any:
        for row in real(self, state, skipped=skipped):
            if losses and delivered[0] == losses[0]:
                losses.pop(0)
                raise ConnectionError("Server Disconnected")
            delivered[0] += 1
            yield row

    monkeypatch.setattr(HubCorpus, "_rows", losing)
    corpus = hub_corpus("org/rows")
    assert list(corpus.documents()) == expected
    assert clock.pauses == [1, 2, 1]  # two tries for one row, then a loss of its own


def test_fraction_before_a_place_is_known_though_no_card_tells_the_rows(rows: HubCorpus) -> None:
    places = [document.position for document in rows.read() if document.position is not None]
    assert [rows.fraction_before(place) for place in places] == [place["row"] / 4000 for place in places]


def test_invalid_utf8_in_a_dataset_is_replaced_and_told(rows: HubCorpus, tmp_path: Path) -> None:
    wrong = pyarrow.array([b"one", b"tw\xffo", b"three"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, wrong.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "rows.parquet")
    assert [(document.text, document.replaced) for document in rows.read()] == [
        ("one", False),
        ("tw\ufffdo", True),
        ("three", False),
    ]


@pytest.mark.parametrize("damage", ["in its middle", "at its end"])
def test_broken_file_of_a_dataset_is_refused_after_a_few_tries(
    rows: HubCorpus, damage: str, clock: Clock, tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    content = bytearray(path.read_bytes())
    if damage == "in its middle":
        middle = slice(len(content) // 2, len(content) // 2 + 200)
        content[middle] = bytes(byte ^ 0x5A for byte in content[middle])
    path.write_bytes(content if damage == "in its middle" else content[: len(content) * 2 // 3])
    corpus = hub_corpus("org/rows")
    with pytest.raises(InputError, match=r"org/rows holds a file that is corrupted at row [\d,]+ \("):
        list(corpus.documents())
    assert clock.pauses == [1, 2, 4, 8]


def test_unknown_config_is_refused_with_those_there_are(rows: HubCorpus) -> None:
    with pytest.raises(InputError, match=r"no config 'huge'.*Available"):
        list(hub_corpus("org/rows", "huge").documents())


def test_column_that_a_dataset_lacks_is_refused(rows: HubCorpus) -> None:
    rows._text_field = "body"
    with pytest.raises(InputError, match=r"no field 'body' in org/rows row 1, only id, text"):
        list(rows.documents())


@pytest.mark.parametrize(
    ("corpus", "repository", "config"),
    [
        ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
        ("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
        ("roneneldan/TinyStories", "roneneldan/TinyStories", None),
    ],
)
def test_names_of_hub_corpora(corpus: str, repository: str, config: str | None) -> None:
    opened = open_corpus(corpus)
    assert isinstance(opened, HubCorpus)
    assert (opened.repository, opened.config) == (repository, config)
    assert open_corpus(corpus, "other").config == "other"  # type: ignore[attr-defined]


def test_without_permission_to_go_online_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"from the Hub \(OfflineModeIsEnabled"):
        list(open_corpus("fineweb-edu").documents())


@pytest.mark.network
def test_fineweb_edu_streams_from_the_hub() -> None:
    corpus = open_corpus("fineweb-edu")
    assert len(corpus.revision) == 40
    assert len(next(corpus.documents())) > 100
