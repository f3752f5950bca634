"""The files below a folder. None is skipped silently: links are followed, and what cannot be read is an error."""

import stat
from pathlib import Path

from common.cli_errors import InputError


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
                require_file(path, mode)
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


def require_file(path: Path, mode: int) -> None:
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
