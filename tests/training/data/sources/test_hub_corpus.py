"""The stream of a Hub dataset, with a fake clock."""

import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.fake_clock import Clock
from support.loopback_hub import COMMIT
from support.small_corpora import documents_of

from common.cli_errors import InputError
from training.data.sources.hub_corpus import HubCorpus
from training.data.sources.open_corpus import open_corpus


def parquet(texts: list[str | None]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), stream, row_group_size=500)
    return stream.getvalue()


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HubCorpus:
    """A Hub corpus with a real stream over a local file."""
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


def test_stream_resumes_from_its_positions(rows: HubCorpus) -> None:
    documents = list(rows.read())
    assert len(documents) == 4000 - 42
    positions = [number for number, document in enumerate(documents) if document.position is not None]
    assert len(positions) >= 3
    for number in positions:
        assert [document.text for document in rows.read(documents[number].position)] == [
            document.text for document in documents[number:]
        ]


@pytest.mark.parametrize("interrupted_at", [3, 1003, 2500])
def test_interrupted_stream_resumes_with_the_next_row(
    rows: HubCorpus, interrupted_at: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = documents_of(rows)
    real = HubCorpus._rows
    interruptions, delivered = [interrupted_at, interrupted_at, interrupted_at + 700], [0]

    def interrupted(self: HubCorpus, state: Any, *, skipped: int) -> Any:
        for row in real(self, state, skipped=skipped):
            if interruptions and delivered[0] == interruptions[0]:
                interruptions.pop(0)
                raise ConnectionError("Server Disconnected")
            delivered[0] += 1
            yield row

    monkeypatch.setattr(HubCorpus, "_rows", interrupted)
    corpus = hub_corpus("org/rows")
    assert documents_of(corpus) == expected
    assert clock.pauses == [1, 2, 1]  # one row fails twice, then another one


def test_fraction_before_a_position_is_known_without_a_count_in_the_card(rows: HubCorpus) -> None:
    positions = [document.position for document in rows.read() if document.position is not None]
    assert [rows.fraction_before(position) for position in positions] == [
        position["row"] / 4000 for position in positions
    ]


def test_invalid_utf8_in_a_dataset_is_replaced_and_flagged(rows: HubCorpus, tmp_path: Path) -> None:
    wrong = pyarrow.array([b"one", b"tw\xffo", b"three"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, wrong.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "rows.parquet")
    assert [(document.text, document.replaced) for document in rows.read()] == [
        ("one", 0),
        ("tw\ufffdo", 1),
        ("three", 0),
    ]


@pytest.mark.parametrize("damage", ["in its middle", "at its end"])
def test_corrupted_file_of_a_dataset_is_an_error_after_a_few_tries(
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
        documents_of(corpus)
    # pyarrow reads ahead in threads, so that the error may come some rows early the first time.
    assert clock.pauses[-4:] == [1, 2, 4, 8]


def test_unknown_config_is_an_error_that_lists_the_known_ones(rows: HubCorpus) -> None:
    with pytest.raises(InputError, match=r"no config 'huge'.*Available"):
        documents_of(hub_corpus("org/rows", "huge"))


def test_missing_column_of_a_dataset_is_an_error(rows: HubCorpus) -> None:
    rows._text_field = "body"
    with pytest.raises(InputError, match=r"no field 'body' in org/rows row 1, only id, text"):
        documents_of(rows)


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


def test_offline_mode_is_an_error_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"from the Hub \(OfflineModeIsEnabled"):
        documents_of(open_corpus("fineweb-edu"))


def test_mistyped_path_is_recognizable_while_the_hub_cannot_be_reached() -> None:
    lines: list[str] = []
    for corpus in ("data/books", "fineweb"):
        opened = open_corpus(corpus, report=lines.append)
        assert isinstance(opened, HubCorpus)
        opened.retry.wait(ConnectionError("Name or service not known"))
    assert lines[0].endswith("retrying in 1 s; no local file or folder is called data/books")
    assert lines[1].endswith("retrying in 1 s")


@pytest.mark.network
def test_fineweb_edu_streams_from_the_hub() -> None:
    corpus = open_corpus("fineweb-edu")
    assert len(corpus.revision) == 40
    assert len(next(corpus.read()).text) > 100
