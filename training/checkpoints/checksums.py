"""Checksums of a checkpoint's files, in the format of `sha256sum`."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from common.atomic_files import file_sha256

_NAME = "training_state/SHA256SUMS"
_REQUIRED = ("trainer_state.json", "optimizer.safetensors", "loop_state.safetensors", "rng_state_0.safetensors")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_ENDINGS = (".json", ".safetensors")  # of files that a resume reads; other programs put other files into a model folder


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file in `folder` to its SHA256SUMS file."""
    lines = [f"{file_sha256(path)}  {path.relative_to(folder)}" for path in sorted(folder.rglob("*")) if path.is_file()]
    (folder / _NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def update_checksums(folder: Path, changed: Iterable[Path]) -> None:
    """Update the checksums of files in `folder` that were changed on purpose."""
    new = {str(path.relative_to(folder)): file_sha256(path) for path in changed}
    old = _read(folder)
    (folder / _NAME).unlink()  # it may be a hard link to another folder's file
    lines = [f"{new.get(file, hash)}  {file}\n" for file, hash in old.items()]
    (folder / _NAME).write_text("".join(lines), encoding="utf-8")


def state_checksum(folder: Path) -> str:
    """Return one hash of the weights and the training state as they were written. Cards do not count."""
    lines = sorted(f"{hash}  {file}" for file, hash in _read(folder).items() if file.endswith(".safetensors"))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def find_corruption(folder: Path, *, read_files: bool = True) -> str | None:
    """Return what is wrong with a folder that has checksums, or None; without `read_files`, only missing files."""
    try:
        sums = _read(folder)
        for file, expected in sums.items():
            if not (folder / file).is_file():
                return f"{file} is missing"
            if read_files and file_sha256(folder / file) != expected:
                return f"{file} has another sha256 than in {_NAME}"
        present = (path for part in (folder, folder / "training_state") for path in sorted(part.iterdir()))
        names = (str(path.relative_to(folder)) for path in present if path.suffix in _ENDINGS)
        required = (f"training_state/{name}" for name in _REQUIRED)
        unlisted = next((name for name in (*required, *names) if name not in sums), None)
    except FileNotFoundError:
        return f"{_NAME} is missing"
    except ValueError as error:
        return f"{_NAME} {error}"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None if unlisted is None else f"{_NAME} has no line for {unlisted} (remove it if it is your own file)"


def _read(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file that has a line; a `ValueError` says what is wrong with the lines."""
    try:
        text = (folder / _NAME).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    lines = [_LINE.fullmatch(line) for line in text.splitlines() or [""]]
    if not text.endswith("\n") or not all(lines):
        raise ValueError("has a line that is not a checksum")
    return {line[2]: line[1] for line in lines if line}
