"""How a person's mistake reaches the person: one line and a non-zero exit code, never a traceback.

A module of its own beside the packages that use it: importing the package `gpt2_scratch` imports transformers, which
takes seconds that a mistyped flag, `--help` or a tokenising worker process should not cost.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_LAUNCHERS_REPORT = "TORCHELASTIC_ERROR_FILE"
_SECONDS_FOR_THE_FIRST_PROCESS = 20.0  # on a busy machine it may come that much later to the same mistake


class InputError(ValueError):
    """Something that a person gave cannot be used.

    The message is one line: what was expected, what was found, and the way out.
    """


class CommandParser(argparse.ArgumentParser):
    """A parser whose complaints are an `InputError`: one line, without the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(f"{message}; --help lists the flags")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and turn an `InputError` into one line on standard error and exit code 2.

    Every other exception is a defect of ours and keeps its traceback.
    """
    try:
        main()
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Most mistakes meet every process, and one line is enough: when the first process tells it and ends, the
            # launcher ends this one here.
            try:
                time.sleep(_SECONDS_FOR_THE_FIRST_PROCESS)
            except KeyboardInterrupt:
                sys.exit(130)
        print(f"error: {error}", file=sys.stderr)
        _tell_launcher(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python would complain again at its end, when it flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def environment_of_helpers(**more: str) -> dict[str, str]:
    """The environment for programs that a process of a run starts: their mistakes are not the run's to its launcher."""
    return {name: value for name, value in os.environ.items() if name != _LAUNCHERS_REPORT} | more


def _tell_launcher(message: str) -> None:
    """Let a launcher of several processes end its own report, which buries our line, with the same words."""
    report = os.environ.get(_LAUNCHERS_REPORT)
    if report:
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
