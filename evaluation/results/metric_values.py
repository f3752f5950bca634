"""The metrics of a task, computed from its records by the `evaluate` modules in `evaluation/metrics/`."""

import functools
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from evaluation.results.standard_errors import exp
from evaluation.tasks.task_types import Task

METRICS = Path(__file__).parents[1] / "metrics"


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric, with its standard error and 95 % confidence interval."""

    value: float  # a fraction for accuracies; infinite for a perplexity that overflows a float
    stderr: float | None  # None for a single item
    interval: Sequence[float] | None  # None for the loss of a single item
    module: str  # the metric module that computed it


class RunningMetric:
    """The first metric of `task` over the records added so far; its text is "acc_norm 0.2955", or empty."""

    def __init__(self, task: Task) -> None:
        self._metric = task.metrics[0]
        self._sum = self._count = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record."""
        prediction, reference = record[self._metric.prediction], record[self._metric.reference]
        accuracy = self._metric.module == "accuracy"
        self._sum += prediction == reference if accuracy else -prediction
        self._count += 1 if accuracy else reference

    def __str__(self) -> str:
        if not self._count:
            return ""
        value = self._sum / self._count
        if self._metric.module == "perplexity":
            value = exp(value)
        elif self._metric.module == "bits_per_byte":
            value /= math.log(2)
        return f"{self._metric.name} {value:.4f}"


def load_metrics(tasks: Iterable[Task]) -> None:
    """Load the metric modules of the tasks, so that an `InputError` about their cache shows before the scoring."""
    for module in {metric.module for task in tasks for metric in task.metrics}:
        _load(module)


def compute_metrics(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, MetricValue]:
    """Return the task's metrics by name; records with nothing to divide by raise an `InputError`."""
    values = {}
    for metric in task.metrics:
        predictions = [record[metric.prediction] for record in records]
        references = [record[metric.reference] for record in records]
        if metric.module != "accuracy" and not sum(references):
            raise InputError(
                f"the {len(records)} items of {task.full_name} hold no {metric.reference}, so there is no "
                f"{metric.name}; raise the limit"
            )
        found = _load(metric.module).compute(predictions=predictions, references=references)
        values[metric.name] = MetricValue(found[metric.module], found["stderr"], found["interval"], metric.module)
    return values


@functools.cache
def _load(module: str) -> Any:
    try:
        import evaluate

        # `evaluate` imports a module that it has just written, whose folder Python may have listed before.
        importlib.invalidate_caches()
        # In memory, because all programs on the machine would share a file on disk.
        return evaluate.load(str(METRICS / module), keep_in_memory=True)
    except OSError as error:
        raise InputError(
            f"cannot write the cache of evaluate's metric modules ({error}); set the environment variable HF_HOME to a "
            "writable folder"
        ) from None
