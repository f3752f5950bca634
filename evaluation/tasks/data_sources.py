"""Where tasks find their data: a folder with the official raw files, or the Hub.

From the Hub the parquet conversion is read that it keeps of every data set (`refs/convert/parquet`), because
`datasets` runs no loading scripts any more. Every complaint about a file names the line.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.cli_errors import InputError

_PARQUET_BRANCH = "refs/convert/parquet"


def hub_rows(repository: str, config: str, split: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a data set on the Hub, all when None.

    Args:
        repository: "Rowan/hellaswag".
        config: the data set's configuration, "default" where it has one only.
        split: "validation" or "test".
        limit: how many rows.

    Raises:
        InputError: the Hub cannot be reached and has not been before.
    """
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        rows = datasets.load_dataset(repository, data_dir=config, split=split, revision=_PARQUET_BRANCH)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"expected the data set {repository} on the Hub, found that it cannot be read ({type(error).__name__}: "
            f"{reason}); connect, or give a folder with the official files by --data_dir"
        ) from None
    return list(rows if limit is None else rows.select(range(min(limit, len(rows)))))


def find_file(data_dir: Path, names: Sequence[str]) -> Path:
    """Return the first of `names` that stands in `data_dir` or anywhere below it.

    Raises:
        InputError: none does.
    """
    for name in names:
        for path in (data_dir / name, *sorted(data_dir.rglob(name))):
            if path.is_file():
                return path
    found = "no such folder" if not data_dir.is_dir() else "none"
    raise InputError(
        f"expected {' or '.join(names)} in {data_dir}, found {found}; put the official file there, or leave out "
        "--data_dir to read the Hub"
    )


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, each with its end, as only "\\n" and "\\r\\n" make one.

    Raises:
        InputError: it cannot be read, or is no UTF-8 text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"expected a file that can be read at {path}, found {error.strerror}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise not_usable(path, line, "UTF-8 text", "other bytes") from None
    if not text.strip():
        raise not_usable(path, 1, "data", "an empty file")
    lines = text.replace("\r\n", "\n").split("\n")
    return [f"{line}\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def json_rows(
    path: Path,
    fields: dict[str, type | tuple[type, ...]],
    limit: int | None,
    check: Callable[[dict[str, Any], Path | str, int], None],
) -> list[dict[str, Any]]:
    """Return the first `limit` rows of a JSON-lines file, all when None.

    Args:
        path: the file.
        fields: what every row must have, and of which type.
        limit: how many rows.
        check: what else there is to refuse; gets the row, the file and the line.

    Raises:
        InputError: a line is not JSON, or lacks a field.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_lines(path), 1):
        if len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # "\\ud800" is JSON, but no text
        except (ValueError, RecursionError) as error:
            raise not_usable(path, number, "a JSON object", f"{line.strip()[:40]!r} ({str(error)[:60]})") from None
        check_row(row, fields, path, number)
        check(row, path, number)
        rows.append(row)
    return rows


def check_row(row: Any, fields: dict[str, type | tuple[type, ...]], path: Path | str, number: int) -> None:
    """Refuse a row that lacks a field or has it of another type.

    Raises:
        InputError: with the line.
    """
    if not isinstance(row, dict):
        raise not_usable(path, number, f"a JSON object with {', '.join(fields)}", repr(row)[:40])
    for name, kind in fields.items():
        if name not in row:
            raise not_usable(path, number, f"the field {name}", ", ".join(row) or "none")
        if not isinstance(row[name], kind):
            kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise not_usable(path, number, f"{name} of type {kinds}", repr(row[name])[:40])


def not_usable(path: Path | str, line: int, expected: str, found: str) -> InputError:
    """Return the complaint about a line of a file."""
    return InputError(
        f"expected {expected} in line {line:,} of {path}, found {found}; fetch the official file again, it may be cut"
    )
