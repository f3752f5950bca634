"""Map a function over items with worker processes, and yield the results in order.

Processes are spawned, not forked: the caller may be a training process with threads and a GPU. Only a few items per
worker are in flight, so memory use does not depend on the number of items. Workers exit when their parent does, even
if the parent was killed.

Workers import this module, so it imports little: a worker starts in a fraction of a second.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from common.cli_errors import TemporaryError
from common.cpus import usable_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order; items are drawn only as far ahead as the workers need.

    The function is pickled once per worker, so it may be large. With 0 workers, this process computes; None uses all
    cores.

    Raises:
        TemporaryError: a worker was killed, usually because memory ran out.
    """
    num_workers = usable_cpus() if num_workers is None else num_workers
    if not num_workers:
        yield from map(function, items)
        return
    pool = start_workers(function, num_workers)
    try:
        yield from results_in_order(pool, items, num_workers=num_workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_workers(function: Callable[[Any], Any], num_workers: int) -> ProcessPoolExecutor:
    """Return a pool of `num_workers` processes that apply `function`, for `results_in_order`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, initializer=_initialize_worker, initargs=(function,))


def results_in_order(
    pool: ProcessPoolExecutor, items: Iterable[Any], *, num_workers: int
) -> Generator[Any, None, None]:
    """Yield the results of the pool's function for each item; see `map_in_order`."""
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) > _IN_FLIGHT_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise TemporaryError(
            f"one of {num_workers} worker processes was killed (out of memory?); "
            "run again with a smaller --num_workers: complete shards are kept"
        ) from None


_function: Callable[[Any], Any]


def _initialize_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    gc.disable()  # the functions create no reference cycles
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
