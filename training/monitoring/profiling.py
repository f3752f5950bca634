"""A trace of some steps by torch's profiler: what ran when, on the host and on the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile


class StepTrace(Protocol):
    """Is told where steps begin and end."""

    def before(self, step: int) -> None:
        """Step `step`, counted from 1, is about to begin."""

    def after(self, step: int) -> None:
        """Step `step` has ended."""


class NoTrace:
    """Traces nothing."""

    def before(self, step: int) -> None:
        """Do nothing."""

    def after(self, step: int) -> None:
        """Do nothing."""


class TraceOf:
    """Traces the steps of a range and writes them as a Chrome trace, compressed, for Perfetto.

    Args:
        steps: counted from 1; all of them are taken.
        folder: gets `trace-steps-10-12.json.gz`.
        say: told where the trace is.
    """

    def __init__(self, steps: range, folder: Path, say: Callable[[str], None]) -> None:
        self._steps = steps
        self._path = folder / f"trace-steps-{steps[0]}-{steps[-1]}.json.gz"
        self._say = say
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Begin where the range begins."""
        if step in self._steps and self._profiler is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, acc_events=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Write the trace where the range ends."""
        if self._profiler is not None and step == self._steps[-1]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None
            self._say(f"trace of steps {self._steps[0]} to {step} in {self._path}; open it at https://ui.perfetto.dev")
