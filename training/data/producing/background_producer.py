"""The producer in the background of training: a child process that is restarted on failure and exits with training.

In the training process there is only a thread that waits for the child. The child's standard input is a pipe that is
never written to: when training ends, even by SIGKILL, the pipe closes and the child exits. The child runs this module,
and so do its worker processes: heavy imports are inside functions.
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
from typing import IO, TYPE_CHECKING

from common.cli_errors import TemporaryError, interrupt_on_sigterm, run_command, subprocess_environment
from common.rate_limited_log import RateLimitedLog

if TYPE_CHECKING:
    from training.data.shards.shard_spec import ShardSpec

SECONDS_BETWEEN_LINES = 60.0

_ROOT = Path(__file__).parents[3]
_FIRST_DELAY_SECONDS = 1.0
_MAX_DELAY_SECONDS = 600.0
_HEALTHY_SECONDS = 120.0  # a child that ran this long had no permanent error
_ATTEMPTS_BEFORE_TRAINING = 5
_SECONDS_TO_EXIT = 15.0
_POLL_SECONDS = 0.1
_USER_ERROR = 2  # the exit code of `run_command`
_TEMPORARY_ERROR = 75  # EX_TEMPFAIL of sysexits.h
_NICENESS = 5  # training has priority
_SECONDS_TO_CLEAN_UP = 10.0


def producer_command(spec: "ShardSpec", num_workers: int) -> list[str]:
    """Return the command of the child process that fills the folder of `spec`."""
    module = "training.data.producing.background_producer"
    return [sys.executable, "-P", "-m", module, spec.to_json(), str(num_workers)]


class BackgroundProducer:
    """Restarts a command until it succeeds; a context manager that stops it on exit.

    Attributes:
        report: receives the child's progress lines, and why it failed and when it restarts; may be replaced.
        failure: an error that a restart cannot resolve, such as a changed corpus; before training starts, also one that
            several restarts did not resolve. A run that waits for a shard ends with it.
        last_error: the child's last error; None again as soon as it prints something.
    """

    def __init__(self, report: Callable[[str], None] = print) -> None:
        self.report = report
        self.failure: str | None = None
        self.last_error: str | None = None
        self._report_rarely = RateLimitedLog(SECONDS_BETWEEN_LINES, lambda line: self.report(line))
        self._stopping = threading.Event()
        self._training = False
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "BackgroundProducer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, command: list[str]) -> None:
        """Run the command in the background."""
        self._thread = threading.Thread(target=self._keep_running, args=(command,), name="producer", daemon=True)
        self._thread.start()

    def training_started(self) -> None:
        """Mark the start of training; after this, only errors that a restart cannot resolve are a `failure`."""
        self._training = True

    def stop(self) -> None:
        """Terminate the child, if it is running, and wait until it has exited."""
        self._stopping.set()
        deadline = time.monotonic() + _SECONDS_TO_EXIT
        while self._thread is not None and self._thread.is_alive():
            if self._process is not None and self._process.poll() is None:
                # SIGTERM lets the child delete partial files; it ignores repetitions.
                self._process.send_signal(signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL)
            self._thread.join(timeout=0.2)

    def _keep_running(self, command: list[str]) -> None:
        delay, failures = _FIRST_DELAY_SECONDS, 0
        while not self._stopping.is_set():
            started = time.monotonic()
            exit_code, error = self._run(command)
            if exit_code == 0 or self._stopping.is_set():
                return
            failures += 1
            self.last_error = error
            permanent = exit_code == _USER_ERROR
            if permanent or (not self._training and failures == _ATTEMPTS_BEFORE_TRAINING):
                self.failure = error
                # Training may still start: its first shards may have been completed just before.
                while not self._training and not self._stopping.wait(_POLL_SECONDS):
                    pass
                if self._stopping.is_set():
                    return
                if permanent:
                    self.report(f"The shard producer failed: {error}; training ends after the shards that are complete")
                    return
                self.failure = None
            if time.monotonic() - started > _HEALTHY_SECONDS:
                delay = _FIRST_DELAY_SECONDS
            meanwhile = "training continues with the shards that are complete; " if self._training else ""
            self.report(f"The shard producer failed: {error}; {meanwhile}restarting it in {delay:.0f} s")
            self._stopping.wait(delay)
            delay = min(2 * delay, _MAX_DELAY_SECONDS)

    def _run(self, command: list[str]) -> tuple[int, str]:
        """Run the command; return its exit code, and the last line on standard error or the signal that killed it."""
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env=subprocess_environment(PYTHONPATH=path, PYTHONUNBUFFERED="1"),
                start_new_session=True,  # Ctrl-C goes to training only, which then stops the child
            ) as process,
        ):
            self._process = process
            assert process.stdout is not None
            for line in process.stdout:
                self._relay(line.rstrip())
            exit_code = process.wait()
            if exit_code < 0:
                return exit_code, f"killed by {signal.Signals(-exit_code).name}"
            return exit_code, _last_line(errors) or f"exit code {exit_code}"

    def _relay(self, line: str) -> None:
        self.last_error = None
        if self._training:
            self._report_rarely(line)
        elif line:
            self.report(line)


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - 10_000))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""


def _produce() -> None:
    """Fill the folder of the spec in the first argument; the work of the child process."""
    interrupt_on_sigterm()
    os.nice(_NICENESS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from training.data.producing.producer import produce
    from training.data.shards.shard_spec import ShardSpec

    try:
        produce(
            ShardSpec.from_json(sys.argv[1]),
            num_workers=int(sys.argv[2]),
            wait=True,
            report=lambda line: print(line, flush=True),
        )
    except TemporaryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_TEMPORARY_ERROR)


def _exit_with_parent() -> None:
    """Exit once standard input closes: the parent holds its other end until it exits or is killed."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_CLEAN_UP)
    os._exit(1)


if __name__ == "__main__":
    run_command(_produce)
