"""The one display of progress: a bar on a terminal, otherwise an occasional log line."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

tqdm.set_lock(threading.RLock())  # its default is a lock between processes, which a killed run leaks


class Progress(contextlib.AbstractContextManager):
    """Progress of a long task, on standard error; a context manager.

    Args:
        total: how many units there are; None if unknown, and then large numbers are shown as 1.2M.
        initial: units that were done before.
        enabled: False shows nothing, as on ranks other than 0.
        report: receives a line every `seconds_between_lines` where there is no terminal; None writes none.
        status_below: show the status on a separate line, below the bar; both disappear at the end.
        bar_format: as of `tqdm`.
    """

    def __init__(
        self,
        *,
        total: int | None = None,
        initial: int = 0,
        unit: str = "items",
        description: str = "",
        enabled: bool = True,
        report: Callable[[str], None] | None = None,
        seconds_between_lines: float = 30.0,
        status_below: bool = False,
        bar_format: str | None = None,
        stream: TextIO | None = None,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self.has_bar = enabled and is_terminal(stream)
        options: dict[str, Any] = {"file": stream, "disable": not self.has_bar, "dynamic_ncols": True}
        options["leave"] = not status_below
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit=f" {unit}",
            unit_scale=total is None,
            desc=description or None,
            smoothing=0,  # the average rate, because work often comes in bursts
            bar_format=bar_format,
            **options,
        )
        self._below = tqdm(total=0, position=1, bar_format="{desc}", **options) if status_below else None
        self._report = report if enabled and not self.has_bar else None
        self._total, self._initial, self._done = total, initial, initial
        self._unit, self._description, self._status = unit, description, ""
        self._seconds_between_lines = seconds_between_lines
        self._started = self._reported = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1, status: str | None = None) -> None:
        """Advance by `count` units, and show `status`; None keeps the last one."""
        self._done += count
        if status is not None:
            self._status = status
            if self._below is not None:
                self._below.set_description_str(status)
            else:
                self._bar.set_postfix_str(status, refresh=False)
        self._bar.update(count)
        if self._report is not None and time.monotonic() - self._reported >= self._seconds_between_lines:
            self._report_line()

    def describe(self, description: str) -> None:
        """Replace the description; the bar shows it at its next update."""
        self._description = description
        self._bar.set_description_str(description, refresh=False)

    def close(self) -> None:
        """Close the bar; without one, report a last line."""
        if self._report is not None:
            self._report_line()
            self._report = None
        if self._below is not None:
            self._below.close()
        self._bar.close()

    def _report_line(self) -> None:
        assert self._report is not None
        self._reported = time.monotonic()
        if self._total is None:
            rate = (self._done - self._initial) / max(self._reported - self._started, 1e-9)
            count = f"{self._done:,} {self._unit} at {rate:,.0f} per second"
        else:
            count = f"{self._done:,} of {self._total:,} {self._unit}"
        line = ", ".join(part for part in (count, self._status) if part)
        self._report(f"{self._description}: {line}" if self._description else line)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a bar can be drawn: not on a terminal of height 0, as in some containers, where tqdm hides it."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).lines > 0
    except (OSError, ValueError):
        return True
