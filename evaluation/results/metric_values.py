"""The metrics of a task, computed from its records by the `evaluate` modules in `evaluation/metrics/`."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from evaluation.tasks.task_types import Metric, Task

METRICS = Path(__file__).parents[1] / "metrics"


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric.

    Attributes:
        value: a fraction for accuracies; infinite for a perplexity that overflows a float.
        stderr: standard error; None for a single item.
        interval: 95 % confidence interval; None for the loss of a single item.
        module: the metric module that computed it.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    module: str


def load_metrics(tasks: Iterable[Task]) -> None:
    """Load the metric modules of the tasks, so that a failure shows before the scoring.

    Raises:
        InputError: the modules' cache is not writable.
    """
    for module in {metric.module for task in tasks for metric in task.metrics}:
        _load(module)


def compute_metrics(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, MetricValue]:
    """Return the task's metrics by name, computed from at least one record.

    Raises:
        InputError: the modules' cache is not writable, or the records are too few for a metric.
    """
    return {metric.name: _compute(task, metric, records) for metric in task.metrics}


def _compute(task: Task, metric: Metric, records: Sequence[Mapping[str, Any]]) -> MetricValue:
    predictions = [record[metric.prediction] for record in records]
    references = [record[metric.reference] for record in records]
    if metric.module != "accuracy" and not sum(references):
        raise InputError(
            f"the {len(records)} items of {task.full_name} hold no {metric.reference}, so there is no "
            f"{metric.name}; raise the limit"
        )
    result = _load(metric.module).compute(predictions=predictions, references=references)
    interval = result["interval"]
    return MetricValue(result[metric.module], result["stderr"], tuple(interval) if interval else None, metric.module)


@functools.cache
def _load(module: str) -> Any:
    try:
        import evaluate

        # In memory, because all programs on the machine would share a file on disk.
        return evaluate.load(str(METRICS / module), keep_in_memory=True)
    except OSError as error:
        raise InputError(
            f"cannot write the cache of evaluate's metric modules ({error}); set the environment variable HF_HOME to a "
            "writable folder"
        ) from None
