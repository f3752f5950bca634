"""Work spread over processes, with its results in order.

Processes are spawned, never forked: the caller may be a training process with threads and a GPU. At most a few items a
worker are under way, so a corpus of any length flows through in constant memory. A worker ends when its parent does,
also when the parent was killed and could say nothing.

This module is what a worker imports, so it imports little: a worker starts in a fraction of a second.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from common.cli_errors import InputError
from training.data.tokenization.bpe import BytePairEncoding

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3


def usable_cpus() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers(Generic[Item, Result]):
    """Processes that apply a function; a context manager.

    Args:
        function: picklable, and pickled once a worker, so it may carry much.
        num_workers: processes; 0 does the work in this one, None takes all cores.
    """

    def __init__(self, function: Callable[[Item], Result], num_workers: int | None = None) -> None:
        self._function = function
        self._number = usable_cpus() if num_workers is None else num_workers

    def __enter__(self) -> "Workers[Item, Result]":
        if self._number:
            self._pool = ProcessPoolExecutor(
                self._number,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_prepare_worker,
                initargs=(self._function,),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._number:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map_in_order(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item, in the items' order; they are read no further ahead than need be.

        Raises:
            InputError: a worker was killed, which is nearly always for want of memory.
        """
        if not self._number:
            yield from map(self._function, items)
            return
        try:
            pending: deque[Future[Result]] = deque()
            for item in items:
                pending.append(self._pool.submit(_call, item))
                if len(pending) > _IN_FLIGHT_PER_WORKER * self._number:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                f"expected {self._number} worker processes to finish, found one killed (out of memory?); "
                "run again with a smaller --num_workers: finished shards are kept"
            ) from None


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in the items' order, from `Workers` that end with the last one."""
    with Workers(function, num_workers) as workers:
        yield from workers.map_in_order(items)


@dataclass(frozen=True)
class EncodeDocuments:
    """Documents -> their ids as one array, (tokens,), each document behind an end-of-text token."""

    bpe: BytePairEncoding
    end_of_text_id: int
    dtype: str

    def __call__(self, documents: Sequence[str]) -> np.ndarray:
        """Return the ids of `documents`, one after the other."""
        mark = np.array([self.end_of_text_id], dtype=self.dtype)
        parts = [part for document in documents for part in (mark, self.bpe.encode(document))]
        return np.concatenate(parts or [mark[:0]], dtype=self.dtype, casting="same_kind")


_function: Callable[[Any], Any]


def _prepare_worker(function: Callable[[Any], Any]) -> None:
    """Leave Ctrl-C to the parent, end with it, and spare the collector: what we build here has no cycles."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(item: Any) -> Any:
    return _function(item)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
