"""How far an evaluation is: a bar with the task's first figure so far, or plain lines where there is no terminal."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

from evaluation.tasks.task_types import Task

SECONDS_BETWEEN_LINES = 30.0


class Running:
    """A task's first figure over the items that are done."""

    def __init__(self, task: Task) -> None:
        self._figure = task.figures[0]
        self._sum = self._count = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record."""
        prediction, reference = record[self._figure.prediction], record[self._figure.reference]
        if self._figure.metric == "accuracy":
            self._sum += prediction == reference
            self._count += 1
        else:
            self._sum -= prediction
            self._count += reference

    def __str__(self) -> str:
        if not self._count:
            return ""
        value = self._sum / self._count
        if self._figure.metric == "perplexity":
            value = math.exp(value) if value < 700 else math.inf
        elif self._figure.metric == "bits_per_byte":
            value /= math.log(2)
        return f"{self._figure.name} {value:.4f}"


class Progress:
    """The progress of a task, on standard error.

    Args:
        task: which.
        total: its items.
        enabled: only the main process shows it.
        stream: where to.
    """

    def __init__(self, task: Task, total: int, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._task, self._total, self._done = task, total, 0
        self._running = Running(task)
        self._stream = sys.stderr if stream is None else stream
        self._enabled = enabled
        self._bar = tqdm(
            total=total,
            desc=task.full_name,
            unit="item",
            dynamic_ncols=True,
            file=self._stream,
            disable=not (enabled and self._stream.isatty()),
        )
        self._said = time.perf_counter()

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record, and show it."""
        self._done += 1
        self._running.add(record)
        if not self._bar.disable:
            self._bar.set_postfix_str(str(self._running), refresh=False)
            self._bar.update()
        elif self._enabled and time.perf_counter() - self._said > SECONDS_BETWEEN_LINES:
            self._say()

    def _say(self) -> None:
        self._said = time.perf_counter()
        print(f"{self._task.full_name}: {self._done:,} of {self._total:,}, {self._running}", file=self._stream)

    def close(self) -> None:
        """End the bar; without one, say how it came out."""
        if self._enabled and self._bar.disable:
            self._say()
        self._bar.close()
