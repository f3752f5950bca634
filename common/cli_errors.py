"""User errors on the command line: one line on standard error and exit code 2, never a traceback.

This module imports only the standard library, so that `--help`, a mistyped flag or a tokenizer worker does not pay for
the import of torch and transformers.
"""

import argparse
import contextlib
import difflib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from common.standard_streams import tolerant_streams

_ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
# Ranks reach the same error at different times on a busy machine.
_SECONDS_FOR_RANK_0 = 20.0
# A command that meets an error of the operating system: what its user can do.
_ADVICE = (
    ((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another path"),
    ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, and run the command again"),
    ((errno.ENAMETOOLONG,), "choose a shorter path"),
    ((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENXIO), "check the path"),
    ((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    ((errno.EIO, errno.ESTALE, errno.EBUSY, errno.ETXTBSY), "check the disk, and run the command again"),
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # in torch's errors


class InputError(ValueError):
    """An input that cannot be used. The message is one line: what is wrong, and what to do."""


class LostConnectionError(InputError):
    """An `InputError` after which the process exits immediately: a normal exit may wait for the lost process."""


class TemporaryError(InputError):
    """An `InputError` that goes away without a change of the input: a full disk, an outage, a killed process."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an error's message on one line, truncated to `limit` characters."""
    return " ".join(str(error).split())[:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` with the known name closest to `name`, or an empty string if none is close."""
    closest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]}?" if closest else ""


def advice_on(error: OSError) -> str | None:
    """Return what to do about a file that cannot be used; None if the error is not about a file."""
    return next((advice for numbers, advice in _ADVICE if error.errno in numbers), None)


def os_error_message(error: OSError) -> str | None:
    """Return one line about a file that cannot be used, and what to do; None if the error is not about a file."""
    advice = advice_on(error)
    if advice is None or error.strerror is None:
        return None
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names or 'a file'} cannot be used: {error.strerror}; {advice}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python's or torch's memory, on a CPU or a GPU, was not enough."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


class CommandParser(argparse.ArgumentParser):
    """An argument parser that raises `InputError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the parser's message as an `InputError`."""
        raise InputError(f"{message}; --help lists the flags")


def run_command(main: Callable[[], None], *, output_is_result: bool = False) -> None:
    """Run `main`; turn an `InputError`, an `OSError` about a file, and a lack of memory into one line and exit code 2.

    Printing never fails, unless the `output_is_result`: then a command ends when nobody reads it. Other exceptions are
    bugs and keep their traceback.
    """
    with tolerant_streams(drop_errors=not output_is_result):
        try:
            _check_environment()
            main()
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            # The reader, such as `head`, has closed the pipe. Python would fail again when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except InputError as error:
            _exit_with(str(error), at_once=isinstance(error, LostConnectionError))
        except OSError as error:
            message = os_error_message(error)
            if message is None:
                raise
            _exit_with(message)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error, 120)
            _exit_with(
                f"there is not enough memory{f' ({reason})' if reason else ''}; use a smaller model or batch, or raise "
                "the limit (ulimit -v)"
            )


def _check_environment() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise InputError("the current folder was deleted; change to another one, and run the command again") from None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while `gpt2_scratch` was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not os.environ.get("HF_TOKEN", "").isascii():
        del os.environ["HF_TOKEN"]  # the Hub's client could not send it
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                "HF_TOKEN holds characters that no token has, and is not used; copy it again from https://huggingface.co",
                file=sys.stderr,
            )


def _exit_with(message: str, *, at_once: bool = False) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # All ranks usually hit the same error. Rank 0 reports it and exits; then the launcher stops this rank.
        try:
            time.sleep(_SECONDS_FOR_RANK_0)
        except KeyboardInterrupt:
            sys.exit(130)
    print(f"error: {message}", file=sys.stderr)
    _report_to_launcher(f"error: {message}")
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does, so that partial files are deleted; further ones are ignored."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def subprocess_environment(**changes: str) -> dict[str, str]:
    """Return the environment for a subprocess of a rank, whose errors must not reach the launcher as the rank's own."""
    return {name: value for name, value in os.environ.items() if name != _ERROR_FILE_VARIABLE} | changes


def _report_to_launcher(message: str) -> None:
    """Make torchrun's own report, printed after ours, end with the same message."""
    path = os.environ.get(_ERROR_FILE_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
