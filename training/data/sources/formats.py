"""Which files are read, by their ending, and opening them: compressed ones, and those inside tar and zip archives."""

import contextlib
import functools
import io
import lzma
import tarfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from common.cli_errors import InputError, one_line

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
_HIDDEN = ("/.", "/__MACOSX/")
_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError)  # RuntimeError: a password is needed


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
ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
FILE_ENDINGS = (*_FORMATS, *ARCHIVE_ENDINGS)
ENDINGS_IN_WORDS = (
    f"{', '.join(_KINDS)}; text, JSON and CSV also with {', '.join(filter(None, _COMPRESSIONS))}; tar and zip of these"
)


class Member(NamedTuple):
    """A file in an archive."""

    archive: Path
    path: str
    size: int

    @property
    def name(self) -> str:
        """Return the file's name, without folders."""
        return PurePosixPath(self.path).name

    def __str__(self) -> str:
        return f"{self.archive}/{self.path}"


def ending_of(name: str) -> str:
    """Return the longest of the known endings that a file's name has, or nothing."""
    return max((ending for ending in FILE_ENDINGS if name.lower().endswith(ending)), key=len, default="")


def format_of(name: str) -> Format | None:
    """Return the format of a file of this name; None for an archive, and where it is not read."""
    return _FORMATS.get(ending_of(name))


def open_plain(file: Path | Member) -> io.BufferedReader:
    """Return the file, opened; an `InputError` if that is impossible. Members are read in order fastest."""
    try:
        if isinstance(file, Path):
            return file.open("rb")
        archive = _archive(file.archive)
        is_zip = isinstance(archive, zipfile.ZipFile)
        return _Stream(archive, archive.open(file.path) if is_zip else archive.extractfile(file.path))
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
        except (OSError, EOFError, lzma.LZMAError, pyarrow.ArrowException, *_ARCHIVE_ERRORS) as error:
            kind = format.compression or format.kind
            raise InputError(f"{file} is not a complete {kind} file ({one_line(error)}); download it again") from None


def members_of(path: Path) -> list[Member]:
    """Return the files of an archive in its order, without hidden ones.

    Raises:
        InputError: the file is not a complete archive.
    """
    try:
        archive = _archive(path)
        if isinstance(archive, zipfile.ZipFile):
            found = [Member(path, info.filename, info.file_size) for info in archive.infolist() if not info.is_dir()]
        else:
            found = [Member(path, info.name, info.size) for info in archive.getmembers() if info.isfile()]
    except (OSError, EOFError, *_ARCHIVE_ERRORS) as error:
        raise InputError(f"{path} is not a complete archive ({one_line(error)}); download it again") from None
    return [file for file in found if not any(part in f"/{file.path.removeprefix('./')}" for part in _HIDDEN)]


class _Stream(io.BufferedReader):
    """A member's bytes; keeps the archive open."""

    def __init__(self, archive: Any, member: Any) -> None:
        super().__init__(member)
        self._archive = archive


@functools.lru_cache(maxsize=1)
def _archive(path: Path) -> Any:
    """Return the archive, opened: a compressed one would be read again from its beginning for every member."""
    file = path.open("rb")
    try:
        archive = zipfile.ZipFile(file) if path.name.lower().endswith(".zip") else tarfile.open(fileobj=file)  # noqa: SIM115
    except BaseException:
        file.close()
        raise
    weakref.finalize(archive, file.close)
    return archive


def advance(stream: Any, offset: int) -> None:
    """Move a stream that nothing was read from to a byte, by reading if it is compressed."""
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        stream.seek(offset)
        return
    while offset > 0 and (skipped := len(stream.read(min(offset, 1 << 20)))):
        offset -= skipped
