"""A model judged on tasks: items from the data, scores from the model, records, figures.

The command line and training both go through here. Everything happens on every process of the accelerator together;
records are complete on the main process.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from common.cli_errors import InputError
from common.progress import Progress
from evaluation.results.item_cache import FinishedItems, item_key
from evaluation.results.metric_values import Measured, measure
from evaluation.results.running_metric import RunningMetric
from evaluation.tasks.task_types import Encoder, Item, Task

_T = TypeVar("_T")


@dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task.

    Attributes:
        task: with its protocol, "hellaswag:harness".
        items: how many.
        seconds: of scoring those that were not finished before.
        figures: by name, as the task orders them.
        records: of each item, in the data's order.
    """

    task: str
    items: int
    seconds: float
    figures: dict[str, Measured]
    records: list[dict[str, Any]] = field(repr=False)


def read_items(
    tasks: Sequence[Task], data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None
) -> dict[str, list[Item]]:
    """Return each task's items by its full name.

    Raises:
        InputError: a task's data is not there, or cannot be used.
    """
    found = {}
    for task in tasks:
        found[task.full_name] = task.items(data_dir, encoder, n_positions, limit)
        if not found[task.full_name]:
            raise InputError(f"expected items of {task.full_name}, found none; give other data by --data_dir")
    return found


def judge(
    model: Any,
    task: Task,
    items: Sequence[Item],
    *,
    accelerator: Any,
    tokens_per_batch: int | None = None,
    every_process_scores_all: bool = False,
    finished: FinishedItems | None = None,
    show: bool = False,
    between_batches: Callable[[], None] = lambda: None,
) -> TaskResult:
    """Return what the model reaches on a task, on every process the same.

    Args:
        model: any causal language model of transformers, on its device, not wrapped.
        task: which.
        items: the task's, as `read_items` gives them.
        accelerator: spreads the items over its processes.
        tokens_per_batch: tokens in a forward pass; None for what the device likes.
        every_process_scores_all: the model is sharded, so its forward passes need all processes alike.
        finished: records that are known already, and where new ones are kept; None on all but the main process.
        show: the progress.
        between_batches: as of `scoring.score`.

    Raises:
        InputError: from `scoring.score`, or from `figures.measure`.
    """
    from evaluation.scoring.scorer import score

    started = time.perf_counter()
    keys = [item_key(task, item) for item in items]
    records = agreed(accelerator, lambda: [finished.records.get(key) if finished else None for key in keys])
    missing = [place for place, record in enumerate(records) if record is None]
    place_of = {item.index: place for place, item in enumerate(items)}
    progress = Progress(
        total=len(items),
        description=task.full_name,
        enabled=show and accelerator.is_main_process,
        report=lambda line: print(line, file=sys.stderr),
    )
    running = RunningMetric(task)

    def count(record: dict[str, Any]) -> None:
        running.add(record)
        progress.update(status=str(running))

    for record in records:
        if record is not None:
            count(record)

    def recorded(item: Item, answers: Sequence[Any]) -> dict[str, Any]:
        return {**task.predict(item, answers), "data": item.data}

    def keep(item: Item, answers: Sequence[Any]) -> None:
        record = recorded(item, answers)
        if finished is not None:
            finished.add(keys[place_of[item.index]], record)
        count(record)

    answers = score(
        model,
        [items[place] for place in missing],
        accelerator=None if every_process_scores_all else accelerator,
        tokens_per_batch=tokens_per_batch,
        on_result=keep,
        between_batches=between_batches,
    )
    for place, given in zip(missing, answers, strict=True):
        records[place] = recorded(items[place], given)
    progress.close()
    complete = [record for record in records if record is not None]
    figures = agreed(accelerator, lambda: measure(task, complete))
    return TaskResult(task.full_name, len(items), time.perf_counter() - started, figures, complete)


def on_every_process(accelerator: Any, compute: Callable[[], _T]) -> _T:
    """Return what `compute` gives on this process, first on its machine's main one, which downloads for the others.

    An `InputError` that any process meets is raised on every one: none is left waiting, and it is told once.
    """
    found: list[_T] = []
    trouble: str | None = None
    with accelerator.local_main_process_first():
        try:
            found.append(compute())
        except InputError as error:
            trouble = str(error)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        trouble = next((each for each in gather_object([trouble]) if each is not None), None)
    if trouble is not None:
        raise InputError(trouble)
    return found[0]


def agreed(accelerator: Any, compute: Callable[[], _T]) -> _T:
    """Return what `compute` gives on the main process, on every process; so is an `InputError` raised on every one."""
    if accelerator.num_processes == 1:
        return compute()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = compute()
        except InputError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]
