"""A model on a task: items, cached or scored, become records, and records become metrics.

The command line and training both use it. All processes of the accelerator take part together.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object

from common.cli_errors import InputError
from common.progress import Progress
from common.ranks import Ranks
from evaluation.results.item_cache import ItemCache
from evaluation.results.metric_values import RunningMetric, compute_metrics
from evaluation.results.results_file import TaskResult
from evaluation.scoring.scorer import score_batches
from evaluation.tasks.task_types import Encoder, Item, Task

_T = TypeVar("_T")


def read_items(
    tasks: Sequence[Task], data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None
) -> dict[str, list[Item]]:
    """Return each task's items by its full name; data that is missing or malformed raises an `InputError`."""
    items = {task.full_name: task.items(data_dir, encoder, n_positions, limit) for task in tasks}
    for name, found in items.items():
        if not found:
            raise InputError(f"the data of {name} has no items; pass another --data_dir")
    return items


def run_task(
    model: Any,
    task: Task,
    items: Sequence[Item],
    *,
    accelerator: Any,
    tokens_per_batch: int | None = None,
    sharded_model: bool = False,
    cache: ItemCache | None = None,
    show_progress: bool = False,
    between_batches: Callable[[], None] = lambda: None,
) -> TaskResult:
    """Return the result of a model on a task, the same on every process.

    Args:
        model: any causal language model of transformers, on its device, unwrapped.
        items: of the task, from `read_items`.
        accelerator: distributes the items over its processes.
        sharded_model: forward passes need all processes, so each process scores all items.
        cache: of the main process; None on the others, or without a cache.
        show_progress: on the main process.
        between_batches: is called equally often on every process; may raise to stop the evaluation.

    Raises:
        InputError: from `score_batches` or `compute_metrics`.
    """
    started = time.perf_counter()
    cached = from_main_process(accelerator, lambda: [cache.get(task, item) if cache else None for item in items])
    records: dict[int, dict[str, Any]] = {n: record for n, record in enumerate(cached) if record is not None}
    missing = [n for n in range(len(items)) if n not in records]
    running = RunningMetric(task)
    for record in records.values():
        running.add(record)
    progress = Progress(
        total=len(items),
        initial=len(records),
        description=task.full_name,
        enabled=show_progress and accelerator.is_main_process,
        report=lambda line: print(line, file=sys.stderr),
    )
    batches = score_batches(
        model,
        [items[n] for n in missing],
        accelerator=None if sharded_model else accelerator,
        tokens_per_batch=tokens_per_batch,
    )
    with progress, contextlib.closing(batches):
        progress.update(0, status=str(running))
        for batch in batches:
            for position, scores in batch:
                n = missing[position]
                records[n] = {"index": items[n].index, **task.record(items[n], scores), "data": items[n].data}
                if cache is not None:
                    cache.add(task, items[n], records[n])
                running.add(records[n])
                progress.update(status=str(running))
            if len(records) < len(items):
                between_batches()
    ordered = [records[n] for n in range(len(items))]
    metrics = from_main_process(accelerator, lambda: compute_metrics(task, ordered))
    return TaskResult(task.full_name, len(items), time.perf_counter() - started, metrics, ordered)


def on_every_process(accelerator: Any, compute: Callable[[], _T]) -> _T:
    """Return the result of `compute` on this process; a node's main process runs first and downloads for the others.

    An `InputError` on any process is raised on all of them.
    """
    ranks = _ranks(accelerator)
    with ranks.share_errors():
        failed = None
        with accelerator.local_main_process_first():
            try:
                result = compute()
            except (InputError, OSError) as error:  # leaving the block by an exception would skip its barrier
                failed = error
        if failed is not None:
            raise failed
    ranks.gather(None)
    return result


def from_main_process(accelerator: Any, compute: Callable[[], _T]) -> _T:
    """Return the main process's result of `compute` on every process; its `InputError` is raised on every process."""
    ranks = _ranks(accelerator)
    with ranks.share_errors():
        result = compute() if accelerator.is_main_process else None
    return ranks.gather(result)[0]  # type: ignore[return-value]


def _ranks(accelerator: Any) -> Ranks:
    return Ranks(gather_object if accelerator.num_processes > 1 else None)
