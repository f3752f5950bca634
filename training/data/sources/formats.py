"""Which files are read, by their ending: the kind of their content and their compression; and opening them."""

import contextlib
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from common.cli_errors import InputError, one_line
from training.data.sources.archives import ARCHIVE_ENDINGS, ARCHIVE_ERRORS, Member

Kind = Literal["text", "json lines", "json", "csv", "Parquet", "Arrow"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
_COMPRESSIONS = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_BUFFER_BYTES = 1 << 16


class Format(NamedTuple):
    """The kind of a file's content and its compression."""

    kind: Kind
    compression: str | None


_FORMATS = {
    kind_ending + ending: Format(kind, compression)
    for kind_ending, kind in _KINDS.items()
    for ending, compression in _COMPRESSIONS.items()
    if compression is None or kind not in ("Parquet", "Arrow")  # compressed inside, and not read in order
}
FILE_ENDINGS = (*_FORMATS, *ARCHIVE_ENDINGS)
ENDINGS_IN_WORDS = (
    f"{', '.join(_KINDS)}; text, JSON and CSV also with {', '.join(filter(None, _COMPRESSIONS))}; tar and zip of these"
)


def format_of(name: str) -> Format | None:
    """Return the format of a file of this name; None where it is not read."""
    endings = [ending for ending in _FORMATS if name.lower().endswith(ending)]
    return _FORMATS[max(endings, key=len)] if endings else None


def open_plain(file: Path | Member) -> io.BufferedReader:
    """Return the file, opened; an `InputError` if that is impossible."""
    try:
        return file.open() if isinstance(file, Member) else file.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None


@contextlib.contextmanager
def opened(file: Path | Member, format: Format) -> Iterator[Any]:
    """Yield the file's decompressed bytes as a stream; errors while it is read become an `InputError`."""
    import pyarrow

    with open_plain(file) as plain:
        stream: Any = plain
        try:
            if format.compression == "xz":
                stream = io.BufferedReader(lzma.LZMAFile(plain), _BUFFER_BYTES)  # noqa: SIM115
            elif format.compression is not None:
                # pyarrow detects truncation in all formats; `zstandard` takes it for the end.
                stream = io.BufferedReader(pyarrow.CompressedInputStream(plain, format.compression), _BUFFER_BYTES)
            yield stream
        except (OSError, EOFError, lzma.LZMAError, pyarrow.ArrowException, *ARCHIVE_ERRORS) as error:
            kind = format.compression or format.kind
            raise InputError(f"{file} is not a complete {kind} file ({one_line(error)}); download it again") from None


def advance(stream: Any, offset: int) -> None:
    """Move a stream that nothing was read from to a byte, by reading if it is compressed."""
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (skipped := len(stream.read(min(offset, 1 << 20)))):
        offset -= skipped
