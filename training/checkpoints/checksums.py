"""The hashes of a checkpoint's files, kept in a file that `sha256sum --check` reads as well."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from common.atomic_files import file_sha256

_NAME = "training_state/SHA256SUMS"


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file of `folder` into one of them."""
    lines = [f"{file_sha256(path)}  {path.relative_to(folder)}" for path in sorted(folder.rglob("*")) if path.is_file()]
    (folder / _NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def renew_checksums(folder: Path, changed: Iterable[Path]) -> None:
    """Bring the checksums up to date for files of `folder` that were changed on purpose."""
    new = {str(path.relative_to(folder)): file_sha256(path) for path in changed}
    lines = [line.split("  ", 1) for line in (folder / _NAME).read_text(encoding="utf-8").splitlines()]
    (folder / _NAME).unlink()  # it may be linked to another folder's
    (folder / _NAME).write_text("".join(f"{new.get(file, old)}  {file}\n" for old, file in lines), encoding="utf-8")


def state_checksum(folder: Path) -> str:
    """One hash for the weights and the state to go on from, as they were written; names and cards play no part."""
    lines = (folder / _NAME).read_text(encoding="utf-8").splitlines()
    tensors = sorted(line for line in lines if line.endswith(".safetensors"))
    return hashlib.sha256("\n".join(tensors).encode()).hexdigest()


def damage_in(folder: Path, *, read_files: bool = True) -> str | None:
    """What is wrong with a folder that `write_checksums` was called on, or None when nothing is.

    Without `read_files` only missing files are found, which takes no time.
    """
    try:
        lines = [line.split("  ", 1) for line in (folder / _NAME).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return f"{_NAME} is missing"
    except (OSError, UnicodeDecodeError) as error:
        return f"{_NAME} cannot be read ({error})"
    for line in lines or [[]]:
        if len(line) != 2:
            return f"{_NAME} has a line that is no checksum"
        expected, file = line
        if not (folder / file).is_file():
            return f"{file} is missing"
        try:
            if read_files and file_sha256(folder / file) != expected:
                return f"{file} is not what was written: its sha256 differs from the one in {_NAME}"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None
