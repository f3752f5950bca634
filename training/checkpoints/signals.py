"""Stopping on a signal, and saving by the clock: all ranks do either after the same step.

A signal may reach only one rank, or each rank in a different step. So after every step, and between two batches of an
evaluation, ranks exchange their requests. The exchange runs on the CPU and its result is used one call later: it never
waits for a device.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Self, TypeVar

import torch
import torch.distributed
from torch import Tensor

from training.step.hooks import Hook, Run
from training.step.train_step import StepResult

_Item = TypeVar("_Item")

_NOTICE = b"\n%s: finishing this step and saving. Send it again to exit immediately.\n"
# A launcher of several processes forwards the signal that they already got from the terminal or the scheduler, and a
# terminal that closes sends SIGHUP through the shell too.
_ECHO_SECONDS = 1.0


class SignalWatch:
    """Records SIGTERM, SIGINT and SIGHUP instead of exiting; a second signal exits immediately. A context manager.

    A launcher (`accelerate launch`, `torchrun`) that was killed counts as SIGTERM: it leaves its processes running.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._first_time = 0.0
        self._process = os.getpid()
        self._launcher = os.getppid() if _is_launched() else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows no handlers elsewhere
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is SystemExit and self._before and _is_one_of_several():
            # When the first process exits, the launcher sends SIGTERM to the others, which are about to exit anyway.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @property
    def received(self) -> int:
        """The signal that this process got; 0 for none."""
        launcher_is_gone = self._launcher is not None and os.getppid() != self._launcher
        return self._first or (signal.SIGTERM if launcher_is_gone else 0)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a dataloader worker, which exits when training does
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._first is None:
            self._first, self._first_time = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):
                    os.write(
                        sys.__stderr__.fileno() if sys.__stderr__ else 2, _NOTICE % signal.Signals(number).name.encode()
                    )
        else:
            may_be_echo = _is_one_of_several() or signal.SIGHUP in (number, self._first)
            if not (may_be_echo and time.monotonic() - self._first_time < _ECHO_SECONDS):
                os._exit(128 + number)


def _is_launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class StopTraining(Exception):  # noqa: N818  (not an error)
    """Raised on all ranks at the same point when a signal (`number`) asks the run to save and exit.

    A checkpoint can be saved at this point if it is `between_steps`.
    """

    def __init__(self, number: int, *, between_steps: bool = True) -> None:
        super().__init__(number)
        self.number, self.between_steps = number, between_steps


class Coordinator(SignalWatch, Hook):
    """Ranks agree here on stopping and on saving every `save_minutes`. As a hook, it stops the run after a step."""

    def __init__(self, *, save_minutes: float | None, num_processes: int, timeout: datetime.timedelta) -> None:
        super().__init__()
        self._save_seconds = None if save_minutes is None else 60 * save_minutes
        self._last_save = time.monotonic()
        self._saves = 0  # so that a result that is one call old does not ask for a second save
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout) if num_processes > 1 else None
        self._pending: tuple[torch.distributed.Work, Tensor] | None = None
        self.stop_signal = 0  # the signal that stops the run, the same on all ranks; 0 for none
        self.save_is_due = False  # by the clock, the same on all ranks

    def after_step(self, run: Run, result: StepResult) -> None:
        """Exchange signals with the other ranks, once per step."""
        self.check_stop()

    def poll(self) -> None:
        """Exchange signals and due saves with the other ranks; all ranks must call this equally often."""
        wanted = [self.received, self._saves + self._clock_is_due()]
        if self._group is not None:
            agreed = self.wait()
            tensor = torch.tensor(wanted)
            work = torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
            assert work is not None
            self._pending = work, tensor
            wanted = agreed or [0, 0]
        self.stop_signal = wanted[0]
        self.save_is_due = wanted[1] > self._saves

    def wait(self) -> list[int] | None:
        """Wait for the exchange in progress and return its result; None if there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        work, tensor = pending
        work.wait()
        return tensor.tolist()

    def check_stop(self, *, between_steps: bool = True) -> None:
        """Poll, and raise `StopTraining` if a signal stops the run."""
        self.poll()
        if self.stop_signal:
            raise StopTraining(self.stop_signal, between_steps=between_steps)

    def checking_stop(self, batches: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the batches, and check for a stop between them; all ranks must have equally many."""
        for number, batch in enumerate(batches):
            if number:
                self.check_stop()
            yield batch

    def restart_clock(self) -> None:
        """Start counting `save_minutes` again; called on all ranks after a save."""
        self._last_save = time.monotonic()
        self._saves += 1
        self.save_is_due = False

    def _clock_is_due(self) -> bool:
        return self._save_seconds is not None and time.monotonic() - self._last_save >= self._save_seconds
