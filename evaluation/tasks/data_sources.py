"""Where tasks find their data: a folder with the official files, or the Hub.

On the Hub, the parquet conversion of the data set is read (`refs/convert/parquet`), because `datasets` no longer runs
loading scripts. Errors name the line.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from common.cli_errors import InputError, one_line
from common.hub_retry import network_errors
from evaluation.tasks.task_types import Encoder, Item, Task

_PARQUET_BRANCH = "refs/convert/parquet"


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield line number and value of each line of a JSON-lines file."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # "\\ud800" is JSON, but not text
        except (ValueError, RecursionError) as error:
            raise unusable(path, number, f"not JSON: {line.strip()[:40]!r} ({str(error)[:60]})") from None
        yield number, row


class RowTask(Task):
    """A task whose items are the rows of a data set: on the Hub, or in an official file of one of `file_names`.

    These may be glob patterns. Every row has the `fields`, of their types.
    """

    repository: str
    config: str = "default"
    split: str
    file_names: Sequence[str]
    fields: ClassVar[Mapping[str, type | tuple[type, ...]]]

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """See `Task.items`."""
        if data_dir is None:
            rows: Iterable[tuple[int, Any]] = enumerate(hub_rows(self.repository, self.config, self.split, limit), 1)
        else:
            path = find_file(data_dir, self.file_names)
            rows = self._parse(path)
        items = []
        for index, (line, row) in enumerate(islice(rows, limit)):
            if problem := self._wrong_field(row) or self._problem(row):
                raise unusable(self.repository if data_dir is None else path, line, problem)
            items.append(self._item(index, row, encoder, n_positions))
        return items

    def _wrong_field(self, row: Any) -> str | None:
        if not isinstance(row, dict):
            return f"not a JSON object: {row!r:.40}"
        for name, kind in self.fields.items():
            if name not in row:
                return f"no field {name!r}"
            if not isinstance(row[name], kind):
                return f"field {name!r} has the wrong type: {row[name]!r:.40}"
        return None

    def _parse(self, path: Path) -> Iterable[tuple[int, Any]]:
        """Yield line number and row of the official file."""
        return json_lines(path)

    @abstractmethod
    def _problem(self, row: dict[str, Any]) -> str | None:
        """Return what is wrong with the values of a row, or None."""

    @abstractmethod
    def _item(self, index: int, row: dict[str, Any], encoder: Encoder, n_positions: int) -> Item: ...


def hub_rows(repository: str, config: str, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a data set on the Hub, or all."""
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        rows = datasets.load_dataset(repository, data_dir=config, split=split, revision=_PARQUET_BRANCH)
    except (ValueError, *network_errors(), datasets.exceptions.DatasetsError) as error:
        reason = one_line(error, 160)
        raise InputError(
            f"cannot read the data set {repository} from the Hub ({type(error).__name__}: {reason}); check the "
            "connection, or pass a folder with the official files as --data_dir"
        ) from None
    return list(rows if limit is None else rows.select(range(min(limit, len(rows)))))


def find_file(data_dir: Path, names: Sequence[str]) -> Path:
    """Return the first of `names`, which may be glob patterns, in `data_dir` or any folder below it."""
    for name in names:
        for path in (data_dir / name, *sorted(data_dir.rglob(name))):
            if path.is_file():
                return path
    where = f"in {data_dir}" if data_dir.is_dir() else f"because the folder {data_dir} does not exist"
    raise InputError(
        f"no file {' or '.join(names)} {where}; put the official file there, or omit --data_dir to read the Hub"
    )


def read_lines(path: Path) -> list[str]:
    r"""Return the lines of a text file with their ends; only "\n" and "\r\n" end a line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise unusable(path, content[: error.start].count(b"\n") + 1, "not UTF-8") from None
    if not text.strip():
        raise unusable(path, 1, "the file is empty")
    lines = text.replace("\r\n", "\n").split("\n")
    return [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def unusable(where: Path | str, line: int, problem: str) -> InputError:
    """Return the error for a line of a file, or a row of a data set."""
    return InputError(f"{where}, line {line:,}: {problem}; download the official file again, it may be truncated")
