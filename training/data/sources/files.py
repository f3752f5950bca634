"""A corpus of files: text, JSON, CSV, Parquet and Arrow, also in archives; see `formats` for the endings.

Reading can start in the middle of text and of plain JSON lines (at a byte) and of Parquet (at a row group). Other files
are read from their beginning.
"""

import functools
import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from training.data.sources.base import Corpus, Piece, Position, corpus_name
from training.data.sources.formats import (
    ARCHIVE_ENDINGS,
    ENDINGS_IN_WORDS,
    Member,
    ending_of,
    format_of,
    members_of,
    open_plain,
    opened,
)
from training.data.sources.rows import MissingFieldError, read_rows
from training.data.sources.text_files import END_OF_TEXT, Separator, read_text

_HASHED_CHUNK_BYTES = 65_536
_HASHED_CHUNKS = 4096  # 256 MiB in total, which takes a fraction of a second
_MAX_BYTES_PER_TOKEN = 8  # natural text has four to five
_ABOUT_THE_DATA = ("readme", "dataset_card", "dataset_info", "dataset_infos", "dataset_dict", "state")
_NAMED_FILES = 5


class FileCorpus(Corpus):
    """A file, or the files below a folder sorted by relative path, without hidden ones.

    A text file is one document, or several with separators; other files hold one per row. A position is [index of the
    file, byte or row in it, lines before it]; in text, [index, byte, characters after it], and 1 inside a document.

    Attributes:
        unread: the files of the folder that are not read.
    """

    def __init__(
        self,
        path: Path,
        text_field: str = "text",
        *,
        separator: str | None = END_OF_TEXT,
        encoding: str | None = None,
    ) -> None:
        path = path.resolve()
        self.name = corpus_name(str(path))
        self.unread: list[str] = []
        self._text_field, self._encoding, self._separator = text_field, encoding, Separator(separator)
        self._root = path if path.is_dir() else path.parent
        if path.is_dir():
            self._files = self._with_documents(files_below(path))
        else:
            self._files = [path]
            if not ending_of(path.name):
                raise InputError(f"{path} does not end in {ENDINGS_IN_WORDS}; rename it")
            _require_file(path, path.stat().st_mode)
        self._sources: list[Path | Member] = []
        for file in self._files:
            self._sources += self._with_documents(members_of(file)) if _is_archive(file) else [file]
        if not self._sources:
            raise InputError(
                f"{path} holds no files that end in {ENDINGS_IN_WORDS}, with a field '{text_field}' where they "
                "hold rows; pass another --corpus or --text_field"
            )

    @functools.cached_property
    def revision(self) -> str:
        """Return a hash of names, sizes and content; beyond 256 MiB, of chunks, so small changes may go unnoticed."""
        digest = hashlib.sha256()
        stride = _HASHED_CHUNK_BYTES * max(1, -(-sum(self._sizes) // (_HASHED_CHUNK_BYTES * _HASHED_CHUNKS)))
        for file, size in zip(self._files, self._sizes, strict=True):
            name = file.relative_to(self._root).as_posix()
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))  # a name need not be UTF-8
            with open_plain(file) as stream:
                for offset in range(0, size, stride):
                    stream.seek(offset)
                    digest.update(stream.read(_HASHED_CHUNK_BYTES))
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """Return a line that names the files that are not read."""
        if not self.unread:
            return []
        count = len(self.unread)
        more = f" and {count - _NAMED_FILES:,} more" if count > _NAMED_FILES else ""
        files = f"{count:,} files of {self._root} are" if count > 1 else f"1 file of {self._root} is"
        return [f"{files} not read: {', '.join(self.unread[:_NAMED_FILES])}{more}"]

    def min_tokens(self) -> int:
        """Return an eighth of the files' bytes; compressed files hold more."""
        return sum(self._sizes) // _MAX_BYTES_PER_TOKEN

    def fraction_before(self, position: Position) -> float:
        """Return the fraction of the files' bytes before a position."""
        index, offset, number = position[:3]
        source, sizes = self._sources[index], self._source_sizes
        if _kind(source) == "Parquet":
            offset = sizes[index] * number / _num_rows(source)
        return float((sum(sizes[:index]) + min(offset, sizes[index])) / max(1, sum(sizes)))

    def describe(self, position: Position) -> str:
        """Return the file, and the byte or row in it, counted from 1."""
        index, offset, number = position[:3]
        source = self._sources[index]
        return f"{source}, byte {offset:,} or after it" if _kind(source) == "text" else f"{source}, row {number + 1:,}"

    def _with_documents(self, files: list[Any]) -> list[Any]:
        """Return the files, of a folder or an archive, that are read; the others are `unread`.

        A README or a dataset's description is no document, if there is data of another kind.
        """
        read = [file for file in files if ending_of(file.name)]
        data = [file for file in read if file.name.split(".")[0].lower() not in _ABOUT_THE_DATA]
        if any(not file.name.lower().endswith(".md") for file in data):
            read = data
        read = [file for file in read if self._has_text(file)]
        kept = set(read)
        self.unread += [str(file).removeprefix(f"{self._root}/") for file in files if file not in kept]
        return read

    def _has_text(self, file: Path | Member) -> bool:
        """Return whether a file of a folder holds documents: settings and tables of something else do not."""
        format = format_of(file.name)
        if format is None:
            return isinstance(file, Path) and _is_archive(file)
        if format.kind not in ("json", "csv", "Arrow"):
            return True
        try:
            with opened(file, format) as stream:
                next(read_rows(stream, format, file, self._text_field, self._encoding), None)
        except MissingFieldError:
            return False
        return True

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [file.stat().st_size for file in self._files]

    @functools.cached_property
    def _source_sizes(self) -> list[int]:
        return [source.size if isinstance(source, Member) else source.stat().st_size for source in self._sources]

    def _read(self, start: Position | None) -> Iterator[Piece]:
        first, *inside = start or (0,)
        for index, file in enumerate(self._sources[first:], start=first):
            format = format_of(file.name)
            assert format is not None  # see the constructor
            with opened(file, format) as stream:
                if format.kind == "text":
                    pieces = read_text(stream, file, self._separator, self._encoding, inside)
                else:
                    pieces = read_rows(stream, format, file, self._text_field, self._encoding, inside)
                for piece in pieces:
                    yield piece._replace(position=[index, *piece.position])
            inside = []


def _kind(file: Path | Member) -> str | None:
    format = format_of(file.name)
    return format and format.kind


def _is_archive(file: Path) -> bool:
    return ending_of(file.name) in ARCHIVE_ENDINGS


@functools.cache
def _num_rows(file: Path | Member) -> int:
    import pyarrow.parquet

    with open_plain(file) as stream:
        return max(1, pyarrow.parquet.read_metadata(stream).num_rows)


def files_below(root: Path) -> list[Path]:
    """Return the files below a folder, sorted by relative path, without hidden ones; `root` is resolved.

    Links to folders are followed, unless they lead to a folder that is read already under its own path.

    Raises:
        InputError: a folder cannot be read, a link leads nowhere or to a folder that contains `root`, or an entry is
            neither a file nor a folder.
    """
    found: list[Path] = []
    linked: set[Path] = set()
    remaining = [root]
    while remaining:
        folder = remaining.pop()
        for path in sorted(_entries(folder)):
            mode = _mode(path)
            if not stat.S_ISDIR(mode):
                _require_file(path, mode)
                found.append(path)
                continue
            if path.is_symlink():
                target = path.resolve()
                if root.is_relative_to(target) and root != target:
                    raise InputError(f"{path} is a link to a folder that contains {root}; remove it")
                if any(_is_read(target, other) for other in (root, *linked)):
                    continue
                linked.add(target)
            remaining.append(path)
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _require_file(path: Path, mode: int) -> None:
    """Raise an `InputError` for a pipe, from which a read would wait without end, a socket or a device."""
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path} is a pipe, a socket or a device, not a file; save its content to a file, or remove it"
        )


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not _is_hidden(path.name)]
    except OSError as error:
        raise InputError(
            f"cannot read the folder {folder}: {error.strerror}; change its permissions, or remove it"
        ) from None


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "lost+found"  # which only root may enter


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        what = "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
        raise InputError(f"{path} {what} ({error.strerror}); repair or remove it") from None


def _is_read(folder: Path, root: Path) -> bool:
    """Return whether a folder is read as a part of `root` without further links."""
    return folder.is_relative_to(root) and not any(map(_is_hidden, folder.relative_to(root).parts))
