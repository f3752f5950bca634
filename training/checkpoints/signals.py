"""Leaving when told to: a signal is noticed between two steps, or two batches of a validation or a task, and all
processes agree on where to stop.

A signal may reach one process only, or all of them at different steps. So after every step each tells the others what
it wants, in an exchange on the CPU that is answered one step later: nothing waits for a device, and nobody for the
others longer than the step itself would.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed
from torch import Tensor

# A launcher of several processes passes on the signal that they have already got from the terminal or the scheduler.
_SECONDS_OF_AN_ECHO = 1.0


class SignalWatch:
    """Keeps SIGTERM and SIGINT for the end of the step; the second one leaves at once. A context manager.

    When `accelerate launch` or `torchrun` is killed, its processes are left behind; that counts as SIGTERM.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._first_time = 0.0
        self._process = os.getpid()
        self._launcher = os.getppid() if _is_launched() else None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():  # nobody else may have handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is SystemExit and self._before and _is_one_of_several():
            # A launcher sends SIGTERM to those that are left when the first one has gone; they are about to go.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @property
    def received(self) -> int:
        """The signal that asks this process to leave; 0 for none."""
        if self._first is None and self._launcher is not None and os.getppid() != self._launcher:
            self._first = signal.SIGTERM
        return self._first or 0

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that reads batches ahead; it goes when training goes
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._first is None:
            self._first, self._first_time = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):
                    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _FAREWELL.format(name).encode())
        elif not (_is_one_of_several() and time.monotonic() - self._first_time < _SECONDS_OF_AN_ECHO):
            os._exit(128 + number)


_FAREWELL = "\n{}: the step is finished and saved, then the run stops; once more to leave at once\n"


def _is_launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class LeaveAsked(Exception):  # noqa: N818  (no error)
    """Raised by all processes alike in the middle of what the next start makes up for: a signal asks to leave.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Agreement:
    """What any process wants becomes known to all of them at the same step: with several processes, one step later.

    Args:
        num_processes: of the run.
        timeout: how long a process may keep the others waiting.
    """

    def __init__(self, num_processes: int, timeout: datetime.timedelta) -> None:
        self._group = torch.distributed.new_group(backend="gloo", timeout=timeout) if num_processes > 1 else None
        self._pending: tuple[torch.distributed.Work, Tensor] | None = None

    def exchange(self, *wishes: int) -> list[int]:
        """Tell this process's wishes; return the largest of all processes' wishes as of their last call."""
        if self._group is None:
            return list(wishes)
        earlier = self.settled()
        ours = torch.tensor(wishes)
        work = torch.distributed.all_reduce(ours, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        assert work is not None
        self._pending = work, ours
        return earlier or [0] * len(wishes)

    def settled(self) -> list[int] | None:
        """The outcome of the last exchange, waited for; None when there was none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        work, outcome = pending
        work.wait()
        return outcome.tolist()
