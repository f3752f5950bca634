"""Files inside tar and zip archives, read without unpacking them."""

import functools
import io
import tarfile
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from common.cli_errors import InputError, one_line

ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError)  # RuntimeError: a password is needed


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    archive: Path
    path: str
    size: int

    @property
    def name(self) -> str:
        """Return the file's name, without folders."""
        return PurePosixPath(self.path).name

    def open(self) -> io.BufferedReader:
        """Return the file, opened; an archive is read in order fastest."""
        archive = _archive(self.archive)
        is_zip = isinstance(archive, zipfile.ZipFile)
        return _Stream(archive, archive.open(self.path) if is_zip else archive.extractfile(self.path))

    def __str__(self) -> str:
        return f"{self.archive}/{self.path}"


def members_of(path: Path) -> list[Member]:
    """Return the files of an archive in its order, without hidden ones.

    Raises:
        InputError: the file is not a complete archive.
    """
    try:
        archive = _archive(path)
        if isinstance(archive, zipfile.ZipFile):
            found = [(info.filename, info.file_size) for info in archive.infolist() if not info.is_dir()]
        else:
            found = [(info.name, info.size) for info in archive.getmembers() if info.isfile()]
    except (OSError, EOFError, *ARCHIVE_ERRORS) as error:
        raise InputError(f"{path} is not a complete archive ({one_line(error)}); download it again") from None
    hidden = ("/.", "/__MACOSX/")
    return [
        Member(path, *each) for each in found if not any(part in f"/{each[0].removeprefix('./')}" for part in hidden)
    ]


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
