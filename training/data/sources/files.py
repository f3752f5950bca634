"""A corpus of files: text, JSON lines (plain, gzip, zstd) and Parquet.

Plain JSON lines and Parquet are entered in their middle, at a byte and at a row group; a compressed file is read again
from its start.
"""

import functools
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli_errors import InputError
from training.data.sources.base import (
    FILE_ENDINGS,
    JSONL_ENDINGS,
    TEXT_ENDINGS,
    Corpus,
    Document,
    Place,
    corpus_name,
    no_field,
    one_line,
    text_of,
)

if TYPE_CHECKING:
    import pyarrow

_ROWS_PER_BATCH = 1000
_FINGERPRINTED_BYTES = 65_536
_FINGERPRINTED_PIECES = 4096  # 256 MiB in all, which take a fraction of a second
_MOST_BYTES_PER_TOKEN = 8  # natural text has four to five


class FileCorpus(Corpus):
    """A file, or the files below a folder in the order of their relative paths; hidden ones are left out.

    A .txt or .md file is one document; JSON lines and Parquet hold one a row. A place is [number of the
    file, byte or row in it, lines before it].
    """

    def __init__(self, path: Path, text_field: str = "text") -> None:
        path = path.resolve()
        self._text_field = text_field
        if path.is_dir():
            visible = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path))]
            self._files = sorted(
                (file for file in visible if file.is_file() and file.name.lower().endswith(FILE_ENDINGS)),
                key=lambda file: file.relative_to(path).parts,
            )
            self._root = path
            if not self._files:
                raise InputError(f"expected files that end in {', '.join(FILE_ENDINGS)} in {path}, found none")
        else:
            if not path.name.lower().endswith(FILE_ENDINGS):
                raise InputError(f"expected a file that ends in {', '.join(FILE_ENDINGS)}, found {path}; rename it")
            self._files = [path]
            self._root = path.parent
        self.name = corpus_name(str(path))

    def _revision(self) -> str:
        """Return a hash of names, sizes and content: of all of it up to 256 MiB, of every second 64 KiB up to 512, ….

        So a change of a few bytes in the middle of a large corpus may go unnoticed. Reading all of it would make
        training wait for minutes.
        """
        digest = hashlib.sha256()
        stride = _FINGERPRINTED_BYTES * max(1, -(-sum(self._sizes) // (_FINGERPRINTED_BYTES * _FINGERPRINTED_PIECES)))
        for file in self._files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(self._root).as_posix()}\0{size}\0".encode())
            with _opened(file) as stream:
                for begin in range(0, size, stride):
                    stream.seek(begin)
                    digest.update(stream.read(_FINGERPRINTED_BYTES))
        return digest.hexdigest()

    def least_tokens(self) -> int:
        """Return an eighth of the files' bytes: compression only makes it less than there is."""
        return sum(self._sizes) // _MOST_BYTES_PER_TOKEN

    def is_place(self, place: Place) -> bool:
        """Return whether a place lies in one of the files."""
        return (
            isinstance(place, list)
            and len(place) == 3
            and all(isinstance(number, int) and number >= 0 for number in place)
            and place[0] < len(self._files)
        )

    def share_before(self, place: Place) -> float | None:
        """Return the share of the files' bytes before a place."""
        number, position, _ = place
        file, size = self._files[number], self._sizes[number]
        if file.name.lower().endswith(".parquet"):
            position = size * position / self._rows(file)
        return (sum(self._sizes[:number]) + position) / sum(self._sizes)

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [file.stat().st_size for file in self._files]

    @functools.cache  # noqa: B019 - a corpus lives as long as the program
    def _rows(self, file: Path) -> int:
        import pyarrow.parquet

        return max(1, pyarrow.parquet.read_metadata(file).num_rows)

    def _read(self, start: Place | None) -> Iterator[Document]:
        first, position, lines = start or (0, 0, 0)
        for number, file in enumerate(self._files[first:], start=first):
            ending = file.name.lower()
            if ending.endswith(TEXT_ENDINGS):
                yield _read_text(file, number)
            elif ending.endswith(JSONL_ENDINGS):
                yield from _read_json_lines(file, self._text_field, number, position, lines)
            else:
                yield from _read_parquet(file, self._text_field, number, position)
            position = lines = 0


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _opened(file: Path) -> io.BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"expected to read {file}, found: {error.strerror}") from None


def _decoded(content: bytes, encoding: str = "utf-8") -> tuple[str, bool]:
    """Return text, with U+FFFD for what is not UTF-8, and whether there was any of that."""
    try:
        return content.decode(encoding), False
    except UnicodeDecodeError:
        return content.decode(encoding, errors="replace"), True


def _read_text(file: Path, number: int) -> Document:
    with _opened(file) as stream:
        text, replaced = _decoded(stream.read(), "utf-8-sig")
    return Document(text, [number, 0, 0], replaced)


def _lines(file: Path, position: int, lines: int) -> Iterator[tuple[int, bytes]]:
    """Yield (where it begins, the line) of a file that may be compressed, and then without its first `lines`.

    A compressed file has no places to begin at but its start.
    """
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    if compression is None:
        with _opened(file) as stream:
            stream.seek(position)
            for line in stream:
                yield position, line
                position += len(line)
        return
    import pyarrow

    with _opened(file) as stream:
        try:
            # pyarrow notices a cut-off file in either format; `zstandard` takes it for the end.
            for number, line in enumerate(io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))):
                if number >= lines:
                    yield 0, line
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"expected a whole {compression} file, found {file} broken ({one_line(error)}); fetch it again"
            ) from None


def _read_json_lines(file: Path, text_field: str, number: int, position: int, lines: int) -> Iterator[Document]:
    for before, (begin, line) in enumerate(_lines(file, position, lines), start=lines):
        if line.isspace():
            continue
        text, replaced = _decoded(line, "utf-8" if before else "utf-8-sig")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits are ValueErrors too
            raise InputError(
                f"expected a JSON object in {file} line {before + 1:,}, found text that is not JSON ({error})"
            ) from None
        yield Document(text_of(row, text_field, f"{file} line {before + 1:,}"), [number, begin, before], replaced)


def _read_parquet(file: Path, text_field: str, number: int, first_row: int) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with _opened(file) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
            schema = parquet.schema_arrow
            if text_field not in schema.names:
                raise no_field(text_field, schema.names, str(file))
            row, group = 0, 0
            while group < parquet.num_row_groups and row + parquet.metadata.row_group(group).num_rows <= first_row:
                row += parquet.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, parquet.num_row_groups)
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=groups, columns=[text_field]):
                for value, replaced in texts_of(batch.column(0)):
                    if row >= first_row:
                        text = text_of({text_field: value}, text_field, f"{file} row {row + 1:,}")
                        yield Document(text, [number, row, 0], replaced)
                    row += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(
                f"expected a whole Parquet file, found {file} broken ({one_line(error)}); fetch it again"
            ) from None


def texts_of(column: "pyarrow.Array") -> Iterator[tuple[Any, bool]]:
    """Yield (value, whether bytes in it were replaced); Parquet promises UTF-8, and not everybody keeps the promise."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(is_text(column.type) for is_text in (pyarrow.types.is_string, pyarrow.types.is_large_string)):
        yield from ((value, False) for value in column.to_pylist())
        return
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        yield (None, False) if value is None else _decoded(value)
