"""Checksums of a checkpoint's files, in the format of `sha256sum`."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from common.atomic_files import file_sha256

_NAME = "training_state/SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file in `folder` to its SHA256SUMS file."""
    lines = [f"{file_sha256(path)}  {path.relative_to(folder)}" for path in sorted(folder.rglob("*")) if path.is_file()]
    (folder / _NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def update_checksums(folder: Path, changed: Iterable[Path]) -> None:
    """Update the checksums of files in `folder` that were changed on purpose."""
    new = {str(path.relative_to(folder)): file_sha256(path) for path in changed}
    lines = [line.split("  ", 1) for line in (folder / _NAME).read_text(encoding="utf-8").splitlines()]
    (folder / _NAME).unlink()  # it may be a hard link to another folder's file
    (folder / _NAME).write_text("".join(f"{new.get(file, old)}  {file}\n" for old, file in lines), encoding="utf-8")


def state_checksum(folder: Path) -> str:
    """Return one hash of the weights and the training state as they were written. Cards do not count."""
    lines = (folder / _NAME).read_text(encoding="utf-8").splitlines()
    tensors = sorted(line for line in lines if line.endswith(".safetensors"))
    return hashlib.sha256("\n".join(tensors).encode()).hexdigest()


def find_corruption(folder: Path, *, read_files: bool = True) -> str | None:
    """Return what is wrong with a folder that has checksums, or None; without `read_files`, only missing files."""
    try:
        lines = [line.split("  ", 1) for line in (folder / _NAME).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return f"{_NAME} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{_NAME} cannot be read ({error})"
    for line in lines or [[]]:
        if len(line) != 2:
            return f"{_NAME} has a line that is not a checksum"
        expected, file = line
        if not (folder / file).is_file():
            return f"{file} is missing"
        try:
            if read_files and file_sha256(folder / file) != expected:
                return f"{file} has another sha256 than in {_NAME}"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None
