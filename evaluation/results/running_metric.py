"""A task's first metric over the items scored so far, for its progress bar."""

import math
from collections.abc import Mapping
from typing import Any

from evaluation.tasks.task_types import Task


class RunningMetric:
    """The first metric of `task` over the records added so far; its text is "acc_norm 0.2955", or empty."""

    def __init__(self, task: Task) -> None:
        self._metric = task.metrics[0]
        self._sum = self._count = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record."""
        prediction, reference = record[self._metric.prediction], record[self._metric.reference]
        if self._metric.module == "accuracy":
            self._sum += prediction == reference
            self._count += 1
        else:
            self._sum -= prediction
            self._count += reference

    def __str__(self) -> str:
        if not self._count:
            return ""
        value = self._sum / self._count
        if self._metric.module == "perplexity":
            value = math.exp(value) if value < 700 else math.inf
        elif self._metric.module == "bits_per_byte":
            value /= math.log(2)
        return f"{self._metric.name} {value:.4f}"
