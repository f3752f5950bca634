"""What a task reports: its records through the `evaluate` metric modules of this project."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from evaluation.tasks.task_types import Figure, Task

METRICS = Path(__file__).parents[1] / "metrics"


@dataclass(frozen=True)
class Measured:
    """A figure as measured.

    Attributes:
        value: a fraction for accuracies; infinite for a perplexity beyond a float.
        stderr: its standard error; None for a single item.
        interval: where it lies with 95 %; None for a loss of a single item.
        metric: the module that computed it.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    metric: str


def load_metrics(tasks: Iterable[Task]) -> None:
    """Load the metric modules that the tasks need, so that what keeps them from loading is told before any scoring.

    Raises:
        InputError: their cache cannot be written.
    """
    for metric in {figure.metric for task in tasks for figure in task.figures}:
        _module(metric)


def measure(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Measured]:
    """Return the task's figures by name, in its order.

    Args:
        task: whose records these are.
        records: as `Task.predict` gives them, at least one.

    Raises:
        InputError: the modules' cache cannot be written, or the items are too few for a figure.
    """
    return {figure.name: _measured(task, figure, records) for figure in task.figures}


def _measured(task: Task, figure: Figure, records: Sequence[Mapping[str, Any]]) -> Measured:
    predictions = [record[figure.prediction] for record in records]
    references = [record[figure.reference] for record in records]
    if figure.metric != "accuracy" and not sum(references):
        raise InputError(
            f"expected items of {task.full_name} with {figure.reference}, found none in {len(records)} of them; "
            "raise the limit"
        )
    result = _module(figure.metric).compute(predictions=predictions, references=references)
    interval = result["interval"]
    return Measured(result[figure.metric], result["stderr"], tuple(interval) if interval else None, figure.metric)


@functools.cache
def _module(metric: str) -> Any:
    try:
        import evaluate

        # In memory: a file on disk would be shared, and fought over, by everything that evaluates on this machine.
        return evaluate.load(str(METRICS / metric), keep_in_memory=True)
    except OSError as error:
        raise InputError(
            f"expected a cache for evaluate's metric modules that can be written, found {error}; "
            "name a folder of yours in the environment variable HF_HOME"
        ) from None
