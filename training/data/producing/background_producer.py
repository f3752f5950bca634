"""The producer beside training: a process of its own, started again when it dies, that never outlives training.

The training process stays light: all it holds is a thread that waits. The producer's standard input is a pipe that
nobody writes to; when training ends, in whatever way, the pipe closes and the producer ends too.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from common.cli_errors import InputError, subprocess_environment
from common.rate_limited_log import RateLimitedLog

SECONDS_BETWEEN_LINES = 60.0

_ROOT = Path(__file__).parents[3]
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 600.0
_HEALTHY_SECONDS = 120.0  # a producer that lived this long had nothing lasting wrong with it
_TRIES_BEFORE_TRAINING = 5
_SECONDS_TO_END = 15.0
_SECONDS_BETWEEN_LOOKS = 0.1
_USER_MISTAKE = 2  # the exit code of `run_command`


def producer_command(output: Path, flags: list[str]) -> list[str]:
    """Return the command that fills `output` beside training."""
    return [sys.executable, "-P", "-m", "training.prepare", "--beside", "--output", str(output), *flags]


class ProducerBeside:
    """Keeps a command running until it succeeds; a context manager, at whose end nothing of it is left.

    Args:
        say: is given a line: how far the producer is, that it died and why, when it starts again. May be replaced.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self._pass_on = RateLimitedLog(SECONDS_BETWEEN_LINES, lambda line: self.say(line))
        self._stopping = threading.Event()
        self._training = False
        self._hopeless: str | None = None
        self._died_of: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ProducerBeside":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, command: list[str]) -> None:
        """Run `command` beside this process."""
        self._thread = threading.Thread(target=self._keep_running, args=(command,), name="producer", daemon=True)
        self._thread.start()

    def training_begins(self) -> None:
        """From now on an error of the producer is told, and no longer a reason to end; an earlier one is told now."""
        self._training = True

    @property
    def hopeless(self) -> bool:
        """Return whether waiting for the first shards is in vain; `check` raises why."""
        return self._hopeless is not None

    def check(self) -> None:
        """Raise what makes waiting for the first shards hopeless.

        Raises:
            InputError: with the producer's own line.
        """
        if self._hopeless is not None:
            raise InputError(self._hopeless)

    @property
    def died_of(self) -> str | None:
        """Return the producer's last error, until it is heard of again; None while nothing is wrong with it."""
        return self._died_of

    def stop(self) -> None:
        """End the producer, if it still runs, and wait until it is gone."""
        self._stopping.set()
        if self._thread is None:
            return
        asked: subprocess.Popen[str] | None = None
        deadline = time.monotonic() + _SECONDS_TO_END
        while self._thread.is_alive():
            process = self._process
            if process is not None and process.poll() is None:
                if process is not asked:
                    process.terminate()  # it cleans up
                    asked = process
                elif time.monotonic() > deadline:
                    process.kill()  # what it has finished is whole
            self._thread.join(timeout=0.2)

    def _keep_running(self, command: list[str]) -> None:
        delay, deaths = _FIRST_DELAY_SECONDS, 0
        while not self._stopping.is_set():
            started = time.monotonic()
            exit_code, error = self._run(command)
            if exit_code == 0 or self._stopping.is_set():
                return
            deaths += 1
            self._died_of = error
            if not self._training and (exit_code == _USER_MISTAKE or deaths == _TRIES_BEFORE_TRAINING):
                self._hopeless = error
                # The shards that training begins with may have become whole just before.
                while not self._training and not self._stopping.wait(_SECONDS_BETWEEN_LOOKS):
                    pass
                self._hopeless = None
                if self._stopping.is_set():
                    return
            if time.monotonic() - started > _HEALTHY_SECONDS:
                delay = _FIRST_DELAY_SECONDS
            what = "training goes on with the shards there are; " if self._training else ""
            self.say(f"The producer of shards died: {error}; {what}it starts again in {delay:.0f} s")
            self._stopping.wait(delay)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    def _run(self, command: list[str]) -> tuple[int, str]:
        """Run the command to its end; return its exit code, and its last line on standard error or what killed it."""
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env=subprocess_environment(PYTHONPATH=os.pathsep.join(paths), PYTHONUNBUFFERED="1"),
                start_new_session=True,  # Ctrl-C is training's, which then ends the producer
            ) as process,
        ):
            self._process = process
            assert process.stdout is not None
            for line in process.stdout:
                self._relay(line.rstrip())
            exit_code = process.wait()
            if exit_code < 0:  # it could say nothing; others may have, of what it left behind
                return exit_code, f"killed by {signal.Signals(-exit_code).name}"
            return exit_code, _last_line(errors) or f"exit code {exit_code}"

    def _relay(self, line: str) -> None:
        self._died_of = None
        if self._training:
            self._pass_on(line)
        elif line:
            self.say(line)


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 10_000))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""
