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
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import tiktoken

from gpt2_scratch_errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3


def usable_cpus() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in the items' order.

    Args:
        function: picklable, and pickled once a worker, so it may carry much.
        items: read no further ahead than keeps the workers busy.
        num_workers: processes; 0 does the work in this one, None takes all cores.

    Raises:
        InputError: a worker was killed, which is nearly always for want of memory.
    """
    num_workers = usable_cpus() if num_workers is None else num_workers
    if num_workers == 0:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
        initargs=(function,),
    )
    try:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(_call, item))
            if len(pending) > _IN_FLIGHT_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise InputError(
            f"expected {num_workers} worker processes to finish, found one killed (out of memory?); "
            "run again with a smaller --num_workers: finished shards are kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class EncodeDocuments:
    """Documents -> their ids as one array, (tokens,), each document behind an end-of-text token."""

    encoding: tiktoken.Encoding
    end_of_text_id: int
    dtype: str

    def __call__(self, documents: Sequence[str]) -> np.ndarray:
        """Return the ids of `documents`, one after the other."""
        mark = np.array([self.end_of_text_id], dtype=self.dtype)
        parts = [mark[:0]]
        for document in documents:
            # Ids as an array, which spares an object for each; a special token's text is text here.
            ids = self.encoding.encode_to_numpy(document, allowed_special=set(), disallowed_special=())
            parts += [mark, ids.astype(self.dtype)]
        return np.concatenate(parts)


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
