"""A dataset on the Hub at one commit: rows streamed with `datasets`, or ready shards to download as they are.

An outage is waited for: the stream is opened again where it broke off. Its places are the states of the `datasets`
stream, which knows the file it is in, so going on reads one file again at most. Rows come as Arrow tables, which is
three times as fast as dictionaries of their values and lets invalid UTF-8 be replaced.
"""

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from common.cli_errors import InputError
from common.hub_retry import HubRetry, network_errors
from common.token_files import split_of
from training.data.sources.base import Corpus, Document, Place, no_field, one_line, text_of
from training.data.sources.files import texts_of

if TYPE_CHECKING:
    import datasets
    import pyarrow

_ROWS_BETWEEN_PLACES = 256
_TRIES_OF_A_BROKEN_FILE = 5  # an answer that was cut off can look like one


class HubCorpus(Corpus):
    """A dataset on the Hub. Nothing is asked of the Hub before it is needed.

    Args:
        repository: as owner/name.
        config: its part; None where it has one only.
        name: the shards' prefix.
        text_field: the column that holds the text.
        report: is told, a line a minute, that the Hub cannot be reached.
    """

    def __init__(
        self, repository: str, config: str | None, *, name: str, text_field: str, report: Callable[[str], None]
    ) -> None:
        self.name = name
        self.repository = repository
        self.retry = HubRetry(
            repository,
            report,
            advice="fix this and run the same command again, finished shards are kept; --corpus installed-docs or a "
            "path needs no network",
        )
        self._config = config
        self._text_field = text_field
        self._rows_in_all: int | None = None
        self.hashes: dict[str, str] = {}  # sha256 of large files, as far as `file_sizes` has asked for them

    def can_go_on_from(self, revision: str) -> bool:
        """Read the dataset at `revision` from now on: the Hub keeps every commit."""
        self.revision = revision
        return True

    def is_place(self, place: Place) -> bool:
        """Return whether a place has a row and a stream's state."""
        return isinstance(place, dict) and isinstance(place.get("row"), int) and isinstance(place.get("state"), dict)

    def share_before(self, place: Place) -> float | None:
        """Return the share of the rows before a place; see `_count_rows`."""
        return min(1.0, place["row"] / self._rows_in_all) if self._rows_in_all else None

    def ready_shards(self) -> list[str]:
        """Return the repository's shards of token ids, validation first; none where it holds text.

        With a config, only those in the folder of that name count.

        Raises:
            InputError: there are shards, but none for validation or none for training, of two kinds, or of one name.
        """
        import huggingface_hub

        names = self.retry.call(
            lambda: huggingface_hub.HfApi().list_repo_files(
                self.repository, repo_type="dataset", revision=self.revision
            )
        )
        shards = [(split_of(name), name) for name in sorted(names) if self._is_in_config(name)]
        val = [name for split, name in shards if split == "val"]
        train = [name for split, name in shards if split == "train"]
        kinds = {PurePosixPath(name).suffix for name in (*val, *train)}
        if kinds and not (val and train and len(kinds) == 1):
            raise InputError(
                f"expected shards of one kind for validation and for training in {self.repository}, found "
                f"{len(val)} and {len(train)} of {' and '.join(sorted(kinds))}; name their folder with --corpus_config"
            )
        by_name = {PurePosixPath(name).name: name for name in (*val, *train)}
        for name in (*val, *train):
            if (other := by_name[PurePosixPath(name).name]) != name:
                raise InputError(
                    f"expected shards of different names in {self.repository}, found {name} and {other}; "
                    "name the folder of those that are meant with --corpus_config"
                )
        return [*val, *train]

    def file_sizes(self, names: list[str]) -> dict[str, int]:
        """Return the bytes of each of the repository's files."""
        import huggingface_hub

        found = self.retry.call(
            lambda: huggingface_hub.HfApi().get_paths_info(
                self.repository, names, repo_type="dataset", revision=self.revision
            )
        )
        files = [file for file in found if isinstance(file, huggingface_hub.RepoFile)]
        self.hashes |= {file.path: file.lfs.sha256 for file in files if file.lfs is not None}
        return {file.path: file.size for file in files}

    def download(self, name: str, folder: Path) -> Path:
        """Return a file of the repository, brought into `folder`; what is there of it already is not fetched again."""
        import huggingface_hub

        return Path(
            self.retry.call(
                lambda: huggingface_hub.hf_hub_download(
                    self.repository, name, repo_type="dataset", revision=self.revision, local_dir=folder
                )
            )
        )

    def _is_in_config(self, name: str) -> bool:
        return self._config is None or PurePosixPath(name).is_relative_to(self._config)

    def _revision(self) -> str:
        """Return the commit that `main` stands for."""
        import huggingface_hub

        info = self.retry.call(lambda: huggingface_hub.HfApi().dataset_info(self.repository, expand=["sha"]))
        return str(info.sha)

    def _read(self, start: Place | None) -> Iterator[Document]:
        import pyarrow

        place = start or {"row": 0, "state": None}
        number = place["row"]
        broken_at, tries = -1, 0
        while True:
            try:
                for row, state in self._rows(place["state"], skipped=number - place["row"]):
                    self.retry.reset()
                    if state is not None:
                        place = {"row": number, "state": state}
                    number += 1
                    text, replaced = self._text(row, number)
                    yield Document(text, place if place["row"] == number - 1 else None, replaced)
                return
            except (*network_errors(), pyarrow.ArrowException, UnicodeDecodeError) as error:
                if _is_about_content(error):
                    broken_at, tries = number, tries + 1 if broken_at == number else 1
                    if tries == _TRIES_OF_A_BROKEN_FILE:
                        raise InputError(
                            f"expected whole files in {self.repository}, found one broken at row {number + 1:,} "
                            f"({one_line(error)}); tell its authors, and give another --corpus"
                        ) from None
                self.retry.wait(error)

    def _text(self, row: "pyarrow.Table", number: int) -> tuple[str, bool]:
        """Return the text of a table of one row, and whether bytes in it were replaced."""
        place = f"{self.repository} row {number:,}"
        if self._text_field not in row.column_names:
            raise no_field(self._text_field, row.column_names, place)
        chunks = row.column(self._text_field).chunks
        value, replaced = next(text for chunk in chunks for text in texts_of(chunk))
        return text_of({self._text_field: value}, self._text_field, place), replaced

    def _rows(
        self, state: dict[str, Any] | None, *, skipped: int
    ) -> "Iterator[tuple[pyarrow.Table, dict[str, Any] | None]]":
        """Yield (row, now and then the state from which the stream begins with it), without the first `skipped`."""
        import datasets
        import pyarrow

        try:
            builder = datasets.load_dataset_builder(self.repository, name=self._config, revision=self.revision)
            dataset = builder.as_streaming_dataset(split="train").with_format("arrow")
        except pyarrow.ArrowException:  # which are ValueErrors too
            raise
        except ValueError as error:  # an unknown config, or no split of that name, with the list of those that exist
            raise InputError(
                f"expected a config with a split 'train' in {self.repository}, "
                f"found '{self._config}': {one_line(error)}"
            ) from None
        if self._rows_in_all is None:
            self._rows_in_all = _count_rows(builder)
        if state is not None:
            dataset.load_state_dict(state)
        rows = iter(dataset)
        for _ in range(skipped):
            next(rows, None)
        number = skipped
        while True:
            # Before the row is drawn: the state is then the one that begins with it.
            before = dataset.state_dict() if number and number % _ROWS_BETWEEN_PLACES == 0 else None
            row = next(rows, None)
            if row is None:
                return
            yield row, before
            number += 1


def _is_about_content(error: BaseException) -> bool:
    """Return whether bytes came that made no sense: in some cases pyarrow's error is an OSError without a number."""
    import pyarrow

    nameless = type(error) is OSError and error.errno is None
    return nameless or isinstance(error, pyarrow.ArrowException | UnicodeDecodeError)


def _count_rows(builder: "datasets.DatasetBuilder") -> int | None:
    """Return how many rows a dataset has as its card says, or else about how many: as if all were like its first file.

    FineWeb's card says nothing. None where the files are not Parquet, whose rows nobody has counted.
    """
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
