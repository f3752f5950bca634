"""One writer per folder, by a lock file. The operating system releases the lock when the process exits."""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from common.cli_errors import InputError

LOCK_NAME = ".lock"
_POLL_SECONDS = 1.0
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(folder: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other processes from locking `folder`; create it and its parents, and remove those that stay empty.

    While another process holds the lock, `on_wait` is called every second. Without `on_wait`, an `InputError` is raised
    instead. On a file system without `flock`, nothing is locked.
    """
    from filelock import FileLock, Timeout

    def waiting() -> bool:
        if on_wait is not None:
            on_wait()
        folder.mkdir(parents=True, exist_ok=True)  # the other process may have removed it
        return False

    created = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=on_wait is not None, poll_interval=_POLL_SECONDS, cancel_check=waiting)
    except Timeout:
        raise InputError(f"{_holder(path)} is already writing to {folder}; wait for it or stop it") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    try:
        path.write_text(f"pid {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked: a process that locks it later sees that it was deleted
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for each in created:
                each.rmdir()


def _holder(path: Path) -> str:
    try:
        holder = path.read_text().strip()
    except OSError:
        holder = ""
    return f"another process ({holder})" if holder else "another process"
