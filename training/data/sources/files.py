"""A corpus of files: text, JSON lines (plain, gzip, zstd) and Parquet.

Reading can start in the middle of plain JSON lines (at a byte) and of Parquet (at a row group). A compressed file is
decompressed from its start.
"""

import functools
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli_errors import InputError, one_line
from training.data.sources.base import (
    FILE_ENDINGS,
    JSONL_ENDINGS,
    PARQUET_ENDING,
    TEXT_ENDINGS,
    Corpus,
    Document,
    Position,
    corpus_name,
    missing_field,
    text_of,
)

if TYPE_CHECKING:
    import pyarrow

_ROWS_PER_BATCH = 1000
_HASHED_CHUNK_BYTES = 65_536
_HASHED_CHUNKS = 4096  # 256 MiB in total, which takes a fraction of a second
_MAX_BYTES_PER_TOKEN = 8  # natural text has four to five


class FileCorpus(Corpus):
    """A file, or the files below a folder sorted by relative path, without hidden ones.

    A .txt or .md file is one document; JSON lines and Parquet hold one per row. A position is [index of the file, byte
    or row in it, lines before it].
    """

    def __init__(self, path: Path, text_field: str = "text") -> None:
        path = path.resolve()
        self.name = corpus_name(str(path))
        self._text_field = text_field
        self._root = path if path.is_dir() else path.parent
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.name.lower().endswith(FILE_ENDINGS) and file.is_file()]
            self._files = sorted(found, key=lambda file: file.relative_to(path).parts)
            self._files = [file for file in self._files if "/." not in f"/{file.relative_to(path).as_posix()}"]
            if not self._files:
                raise InputError(f"{path} holds no files that end in {', '.join(FILE_ENDINGS)}; pass another --corpus")
        else:
            self._files = [path]
            if not path.name.lower().endswith(FILE_ENDINGS):
                raise InputError(f"{path} does not end in {', '.join(FILE_ENDINGS)}; rename it")

    @functools.cached_property
    def revision(self) -> str:
        """Return a hash of names, sizes and content; beyond 256 MiB, of chunks, so small changes may go unnoticed."""
        digest = hashlib.sha256()
        stride = _HASHED_CHUNK_BYTES * max(1, -(-sum(self._sizes) // (_HASHED_CHUNK_BYTES * _HASHED_CHUNKS)))
        for file, size in zip(self._files, self._sizes, strict=True):
            digest.update(f"{file.relative_to(self._root).as_posix()}\0{size}\0".encode())
            with _open(file) as stream:
                for offset in range(0, size, stride):
                    stream.seek(offset)
                    digest.update(stream.read(_HASHED_CHUNK_BYTES))
        return digest.hexdigest()

    def min_tokens(self) -> int:
        """Return an eighth of the files' bytes; compressed files hold more."""
        return sum(self._sizes) // _MAX_BYTES_PER_TOKEN

    def is_position(self, value: object) -> bool:
        """Return whether `value` is a position in one of the files."""
        if not isinstance(value, list) or len(value) != 3:
            return False
        return all(isinstance(number, int) and number >= 0 for number in value) and value[0] < len(self._files)

    def fraction_before(self, position: Position) -> float:
        """Return the fraction of the files' bytes before a position."""
        index, offset, _ = position
        file, size = self._files[index], self._sizes[index]
        if file.name.lower().endswith(PARQUET_ENDING):
            offset = size * offset / _num_rows(file)
        return float((sum(self._sizes[:index]) + offset) / sum(self._sizes))

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [file.stat().st_size for file in self._files]

    def _read(self, start: Position | None) -> Iterator[Document]:
        first, offset, lines = start or (0, 0, 0)
        for index, file in enumerate(self._files[first:], start=first):
            ending = file.name.lower()
            if ending.endswith(TEXT_ENDINGS):
                with _open(file) as stream:
                    text, replaced = _decode(stream.read(), "utf-8-sig")
                yield Document(text, [index, 0, 0], replaced)
            elif ending.endswith(JSONL_ENDINGS):
                yield from _read_json_lines(file, self._text_field, index, offset, lines)
            else:
                yield from _read_parquet(file, self._text_field, index, offset)
            offset = lines = 0


def _open(file: Path) -> io.BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


def _corrupted(file: Path, kind: str, error: BaseException) -> InputError:
    return InputError(f"{file} is not a complete {kind} file ({one_line(error)}); download it again")


def _decode(content: bytes, encoding: str = "utf-8") -> tuple[str, bool]:
    """Return the text, with U+FFFD for invalid bytes, and whether there were any."""
    try:
        return content.decode(encoding), False
    except UnicodeDecodeError:
        return content.decode(encoding, errors="replace"), True


def _lines(file: Path, offset: int, lines: int) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, line), from `offset` in a plain file and after `lines` lines in a compressed one."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
    with _open(file) as stream:
        if compression is None:
            stream.seek(offset)
            for line in stream:
                yield offset, line
                offset += len(line)
            return
        import pyarrow

        try:
            # pyarrow detects truncation in both formats; `zstandard` takes it for the end.
            for number, line in enumerate(io.BufferedReader(pyarrow.CompressedInputStream(stream, compression))):
                if number >= lines:
                    yield 0, line
        except (OSError, pyarrow.ArrowException) as error:
            raise _corrupted(file, compression, error) from None


def _read_json_lines(file: Path, text_field: str, index: int, offset: int, lines: int) -> Iterator[Document]:
    for before, (begin, line) in enumerate(_lines(file, offset, lines), start=lines):
        if line.isspace():
            continue
        where = f"{file} line {before + 1:,}"
        content, replaced = _decode(line, "utf-8" if before else "utf-8-sig")
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise InputError(f"{where} is not valid JSON ({error})") from None
        yield Document(text_of(row, text_field, where), [index, begin, before], replaced)


def _read_parquet(file: Path, text_field: str, index: int, first_row: int) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with _open(file) as stream:
        try:
            parquet = pyarrow.parquet.ParquetFile(stream)
            if text_field not in parquet.schema_arrow.names:
                raise missing_field(text_field, parquet.schema_arrow.names, str(file))
            row, group = 0, 0
            while group < parquet.num_row_groups and row + parquet.metadata.row_group(group).num_rows <= first_row:
                row += parquet.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, parquet.num_row_groups)
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=groups, columns=[text_field]):
                for value, replaced in column_values(batch.column(0)):
                    if row >= first_row:
                        text = text_of({text_field: value}, text_field, f"{file} row {row + 1:,}")
                        yield Document(text, [index, row, 0], replaced)
                    row += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise _corrupted(file, "Parquet", error) from None


@functools.cache
def _num_rows(file: Path) -> int:
    import pyarrow.parquet

    return max(1, pyarrow.parquet.read_metadata(file).num_rows)


def column_values(column: "pyarrow.Array") -> Iterator[tuple[Any, bool]]:
    """Yield (value, whether invalid UTF-8 was replaced) for each row; Parquet writers do not always validate text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        yield from ((value, False) for value in column.to_pylist())
        return
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        yield (None, False) if value is None else _decode(value)
