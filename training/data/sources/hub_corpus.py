"""A Hub dataset at one commit, its rows streamed with `datasets`.

After an outage the stream is reopened where it was. A position holds the state of the `datasets` stream, which knows
its file, so resuming reads at most one file again. Rows come as Arrow tables: three times as fast as dictionaries of
values, and invalid UTF-8 can be replaced.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from common.cli_errors import InputError, one_line
from common.hub_retry import HubRetry, network_errors
from training.data.sources.base import HUB_CORPORA, Corpus, Piece, Position
from training.data.sources.rows import column_values, missing_field, text_of

if TYPE_CHECKING:
    import datasets
    import pyarrow

_ROWS_BETWEEN_POSITIONS = 256
_SECONDS_FOR_A_COMMIT = 10.0
_ATTEMPTS_AT_A_CORRUPTED_FILE = 5  # a truncated response can look like one


class HubCorpus(Corpus):
    """A Hub dataset, by repository (owner/name) and config; nothing is requested from the Hub before it is needed."""

    def __init__(
        self, repository: str, config: str | None, *, name: str, text_field: str, report: Callable[[str], None]
    ) -> None:
        self.name = name
        self.repository = repository
        self.config = config
        self.retry = HubRetry(
            repository,
            report,
            advice="fix this and run the same command again (complete shards are kept), or give --corpus "
            "installed-docs or a path, which need no network",
            # It may be a path with a typing error.
            note="" if repository in HUB_CORPORA.values() else f"; no local file or folder is called {repository}",
        )
        self._text_field = text_field
        self._num_rows: int | None = None

    @functools.cached_property
    def revision(self) -> str:
        """Return the commit that `main` points to."""
        import huggingface_hub

        info = self.retry.call(lambda: huggingface_hub.HfApi().dataset_info(self.repository, expand=["sha"]))
        return str(info.sha)

    def at_revision(self, revision: str) -> "HubCorpus":
        """Return the dataset at a commit; the Hub keeps every one."""
        corpus = copy.copy(self)
        corpus.revision = revision
        return corpus

    def holds(self, revision: str) -> bool:
        """Return whether `revision` is a commit of the dataset; asks the Hub once, without retries."""
        import huggingface_hub
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            api = huggingface_hub.HfApi()
            api.dataset_info(self.repository, revision=revision, expand=["sha"], timeout=_SECONDS_FOR_A_COMMIT)
        except RevisionNotFoundError:
            return False
        except network_errors() as error:
            raise InputError(f"cannot read {self.repository} from the Hub ({type(error).__name__})") from None
        return True

    def fraction_before(self, position: Position) -> float | None:
        """Return the fraction of the rows before a position; see `_count_rows`."""
        return min(1.0, position["row"] / self._num_rows) if self._num_rows else None

    def _read(self, start: Position | None) -> Iterator[Piece]:
        import pyarrow

        position = start or {"row": 0, "state": None}
        number = position["row"]
        corrupted_at, attempts = -1, 0
        while True:
            try:
                for row, state in self._rows(position["state"], skipped=number - position["row"]):
                    self.retry.reset()
                    if state is not None:
                        position = {"row": number, "state": state}
                    number += 1
                    yield Piece(self._text(row, number), position if position["row"] == number - 1 else None)
                return
            except (*network_errors(), pyarrow.ArrowException, UnicodeDecodeError) as error:
                if _is_about_content(error):
                    corrupted_at, attempts = number, attempts + 1 if corrupted_at == number else 1
                    if attempts == _ATTEMPTS_AT_A_CORRUPTED_FILE:
                        raise InputError(
                            f"{self.repository} holds a file that is corrupted at row {number + 1:,} "
                            f"({one_line(error)}); report it to the authors, and give another --corpus"
                        ) from None
                self.retry.wait(error)

    def _text(self, row: "pyarrow.Table", number: int) -> str:
        """Return the text of a table of one row."""
        where = f"{self.repository} row {number:,}"
        if self._text_field not in row.column_names:
            raise missing_field(self._text_field, row.column_names, where)
        value = next(item for chunk in row.column(self._text_field).chunks for item in column_values(chunk))
        return text_of({self._text_field: value}, self._text_field, where)

    def _rows(
        self, state: dict[str, Any] | None, *, skipped: int
    ) -> "Iterator[tuple[pyarrow.Table, dict[str, Any] | None]]":
        """Yield the rows after the first `skipped`, every 256th with the stream's state before it."""
        import datasets
        import pyarrow

        try:
            builder = datasets.load_dataset_builder(self.repository, name=self.config, revision=self.revision)
            dataset = builder.as_streaming_dataset(split="train").with_format("arrow")
        except pyarrow.ArrowException:  # some are ValueErrors
            raise
        except ValueError as error:  # an unknown config or split; the message lists those that exist
            raise InputError(
                f"{self.repository} has no config '{self.config}' with a split 'train': {one_line(error)}"
            ) from None
        if self._num_rows is None:
            self._num_rows = _count_rows(builder)
        if state is not None:
            dataset.load_state_dict(state)
        rows = iter(dataset)
        for _ in range(skipped):
            next(rows, None)
        number = skipped
        while True:
            # Take the state before drawing the row, so that it resumes at this row.
            before = dataset.state_dict() if number and number % _ROWS_BETWEEN_POSITIONS == 0 else None
            if (row := next(rows, None)) is None:
                return
            yield row, before
            number += 1


def _is_about_content(error: BaseException) -> bool:
    """Return whether the bytes received made no sense; pyarrow's OSErrors for that have no errno."""
    import pyarrow

    without_number = type(error) is OSError and error.errno is None
    return without_number or isinstance(error, pyarrow.ArrowException | UnicodeDecodeError)


def _count_rows(builder: "datasets.DatasetBuilder") -> int | None:
    """Return the number of rows from the dataset card, or an estimate by the first Parquet file; FineWeb's has none."""
    import fsspec
    import pyarrow.parquet

    splits = builder.info.splits or {}
    if "train" in splits and splits["train"].num_examples:
        return int(splits["train"].num_examples)
    files = list((builder.config.data_files or {}).get("train", []))
    if not files or not files[0].endswith(".parquet"):
        return None
    with fsspec.open(files[0], "rb") as stream:
        return int(pyarrow.parquet.read_metadata(stream).num_rows) * len(files)
