"""Damage to the files of a folder: what disks, editors and people do to them."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NOT_READ = (".py", ".png", ".md", ".log")
_JUNK = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x\0", "\ud800", "../x", [], {}, [[]] * 3)
_INSERTED = (b"\0", b"\n", b"\xff\xfe", b"[" * 2000, b"9" * 5000, b"'", b'"', b"{", b"  ", b"-")


def copy_folder(source: Path, target: Path) -> Path:
    """Return a copy in which large files are hard links: `damage` replaces files, and never writes into them."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(
        shutil.copytree(source, target, copy_function=lambda a, b: (os.link if _is_large(a) else shutil.copy2)(a, b))
    )


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".npy", "tokenizer.json"))


def damage(folder: Path, rng: random.Random) -> tuple[str, list[Path]]:
    """Damage a file of the folder; return what was done, in words, and the paths that were changed."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _NOT_READ)
    path = rng.choice(files)
    kind = rng.choice([*_OF_CONTENT, *_OF_FILES])
    if kind in _OF_FILES:
        other = rng.choice([file for file in files if file.suffix == path.suffix])
        _OF_FILES[kind](path, other)
        return f"{kind} {path.relative_to(folder)}, {other.relative_to(folder)}", [path, other]
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(_OF_CONTENT[kind](before, rng))
    return f"{kind} {path.relative_to(folder)}", [path]


def _flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\1"
    at = rng.randrange(min(len(content), rng.choice([40, 400, len(content)])))  # headers are more interesting
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, len(content) // 2, len(content) - 1, rng.randrange(len(content) + 1)])]


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.choice([0, len(content), rng.randrange(len(content) + 1)])
    return content[:at] + rng.choice(_INSERTED) + content[at:]


def _lines(content: bytes, rng: random.Random) -> bytes:
    """Double, drop or exchange lines."""
    lines = content.splitlines(keepends=True) or [b""]
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        lines.insert(first, lines[second])
    elif kind == 1:
        del lines[first]
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def _digit(content: bytes, rng: random.Random) -> bytes:
    """Change a digit: the file stays valid."""
    digits = [at for at, byte in enumerate(content[:20_000]) if chr(byte).isdigit()]
    if not digits:
        return _flip(content, rng)
    at = rng.choice(digits)
    return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]


def _value(content: bytes, rng: random.Random) -> bytes:
    """Replace or remove a value in a JSON object, at any depth; flip a byte of other files."""
    try:
        root = json.loads(content)
    except ValueError:
        return _flip(content, rng)
    node: Any = root
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            if rng.random() < 0.2:
                del node[key]
            else:
                node[key] = rng.choice(_JUNK)
            break
        node = node[key]
    return json.dumps(root).encode()


def _swap(path: Path, other: Path) -> None:
    before = path.read_bytes(), other.read_bytes()
    for file, content in zip((other, path), before, strict=True):
        file.unlink(missing_ok=True)
        file.write_bytes(content)


def _replace(path: Path, other: Path) -> None:
    content = other.read_bytes()
    path.unlink()
    path.write_bytes(content)


_OF_CONTENT: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "truncate": _truncate,
    "zero": lambda content, rng: bytes(len(content)),  # as a file system does after a crash
    "insert": _insert,
    "lines": _lines,
    "digit": _digit,
    "value": _value,
}
_OF_FILES: dict[str, Callable[[Path, Path], None]] = {
    "delete": lambda path, other: path.unlink(),
    "swap": _swap,
    "replace": _replace,
}
