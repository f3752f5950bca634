"""Standard output and error that never fail: what cannot be printed is reported once and dropped.

A log that cannot be printed must not end a run of days: `| tee log` dies of the same Ctrl-C as the run, `| head` closes
the pipe, a disk is full, and an ASCII terminal has no "×".
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class _Tolerant:
    """A text stream whose errors are reported once on `other`; everything after that is dropped."""

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other = stream, name, other

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Send what is buffered, and everything after it, to the null device."""
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        with contextlib.suppress(OSError):
            reason = f"cannot write to {self._name} ({error.strerror}); nothing more is printed there"
            self._other.write(f"{reason}\n")
            self._other.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant_streams(*, drop_errors: bool = True) -> Iterator[None]:
    """Replace closed standard streams, and let characters that they cannot encode appear as escapes.

    With `drop_errors`, the streams also report an OSError instead of raising it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # strict, or in the C locale surrogateescape
            stream.reconfigure(errors="backslashreplace")
    before = sys.stdout, sys.stderr
    # Python sets a stream to None if its descriptor is closed. The null device takes the lowest free descriptor, so
    # that no file of a run gets it.
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: PTH123, SIM115
    sys.stdout, sys.stderr = out, err
    if drop_errors:
        sys.stdout = cast(TextIO, _Tolerant(out, "standard output", err))
        sys.stderr = cast(TextIO, _Tolerant(err, "standard error", out))
    try:
        yield
    finally:
        if drop_errors:  # now: at exit, Python would report an error and change the exit code
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout, sys.stderr = before
