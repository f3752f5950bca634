"""Files that appear complete or not at all: written under a temporary name, synced to disk, renamed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_SUFFIX = ".unfinished"


class _HashingStream:
    """A binary file, open for writing, that computes the sha256 of what is written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._stream.write(data)


def write_atomically(path: Path, content: str | Callable[[Any], object]) -> str:
    """Write a file that appears only when it is complete, and return its sha256.

    Args:
        path: the file.
        content: its text, or a function that writes to the stream it is given.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("wb") as file:
        stream = _HashingStream(file)
        if isinstance(content, str):
            stream.write(content.encode())
        else:
            content(stream)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync(path.parent)
    return stream.digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
