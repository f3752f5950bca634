"""One producer at a time in a shard folder: a lock that a dead process does not hold."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.cli_errors import InputError
from training.data.shards.manifest import Manifest

LOCK_NAME = ".producer.lock"
_SECONDS_BETWEEN_TRIES = 1.0


@contextlib.contextmanager
def locked(output: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Keep other producers out of `output`, which is made if absent, and removed again if nothing came into it.

    Args:
        output: the shard folder.
        on_wait: called each second while another process holds the lock; None refuses instead of waiting.

    Raises:
        InputError: another process holds the lock, or the folder holds other files than ours.
    """
    path = output / LOCK_NAME
    created = not output.exists()
    if not created and not path.exists() and Manifest.read(output) is None and any(output.iterdir()):
        raise InputError(
            f"expected an empty folder or one of ours, found other files in {output}; give another --output"
        )
    while (descriptor := _try_lock(path)) is None:
        if on_wait is None:
            raise InputError(f"expected to fill {output} alone, found another process at it; wait for it, or end it")
        on_wait()
        time.sleep(_SECONDS_BETWEEN_TRIES)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes, so that nobody can hold the lock of a removed file
        os.close(descriptor)
        if created and not any(output.iterdir()):
            output.rmdir()


def _try_lock(path: Path) -> int | None:
    """Return the open file that holds the lock, or None when another process has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # whoever held it has just removed it
