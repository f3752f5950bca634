"""This rank's batches for training and validation.

The loader is rank-aware, so it is never passed to `accelerator.prepare`: that would shard it a second time, or
broadcast rank 0's batches. Each row is one system call; `torch.utils.data.DataLoader` adds worker processes and
pinned memory.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.cli_errors import InputError
from training.data.loading.order import Order, Window
from training.data.shards.shard_reader import Shard, ShardFolder, ShardReader

POLL_SECONDS = 0.5
UNLIMITED = 1 << 62
IGNORED = -100  # targets that cross-entropy ignores
_OPEN_SHARDS = 8  # samples go through one shard after the other


class _BatchPlan(Protocol):
    """The part of `training.step.batch_plan.BatchPlan` that is used here; that package is above this one."""

    @property
    def sequences_per_step(self) -> int: ...
    @property
    def accumulation_steps(self) -> int: ...
    def samples(self, step: int, micro_step: int, rank: int) -> range: ...


class TrainingShards:
    """The training shards and the order of their windows, while a producer may still be adding shards.

    A shard counts once the manifest names it. Epoch 0 takes the shards in their own order, so the windows of the shards
    that exist already have their final positions; later epochs need all shards. Picklable: each loader process follows
    the folder by itself.

    Raises:
        ValueError: no training shard holds a window.
    """

    def __init__(self, folder: ShardFolder, *, seq_len: int, seed: int) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self._use(folder)

    def _use(self, folder: ShardFolder) -> None:
        self.folder = folder
        self.shards: list[Shard] = folder.train_shards
        self.order = Order([shard.tokens for shard in self.shards], seq_len=self.seq_len, seed=self.seed)

    def refresh(self) -> None:
        """Open the folder again if it was not complete."""
        if not self.folder.complete:
            self._use(ShardFolder.open(self.folder.path))

    def ready(self) -> int:
        """Return how many samples can be read, counted from the first; `UNLIMITED` once the folder is complete."""
        return UNLIMITED if self.folder.complete else self.order.windows_in_epoch(0)

    def shards_of(self, samples: range) -> set[int]:
        """Return the indices of the shards that hold consecutive samples, all of which are ready."""
        ends = [self.order.locate(sample) for sample in (samples[0], samples[-1])]
        same = ends[0][:2] == ends[1][:2]  # an epoch goes through one shard after the other
        return {window.shard for window in (ends if same else map(self.order.locate, samples))}

    def locate(self, sample: int) -> Window:
        """Return the window of `sample`; wait until its shard is complete."""
        while sample >= self.ready():
            self.refresh()
            if sample >= self.ready():
                time.sleep(POLL_SECONDS)
        return self.order.locate(sample)


class TrainingWindows(Dataset[tuple[Tensor, Tensor]]):
    """Sample index → inputs (seq,) and targets (seq,), both int64, the targets already shifted by one.

    Raises:
        InputError: a token id is not in the model's vocabulary; the message names the shard and the offset.
    """

    def __init__(self, source: TrainingShards, vocab_size: int) -> None:
        self.source = source
        self.vocab_size = vocab_size
        self._open: dict[int, ShardReader] = {}  # by shard; each worker process opens its own

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([sample])
        return inputs[0], targets[0]

    def __getitems__(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch, (batch, seq) each, without a tensor per row that would have to be stacked."""
        seq_len = self.source.seq_len
        inputs = np.empty((len(samples), seq_len), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, sample in enumerate(samples):
            window = self._window(sample)[0]
            inputs[row], targets[row] = window[:-1], window[1:]
        if max(inputs.max(), targets.max()) >= self.vocab_size:
            for sample in samples:
                _check_ids(*self._window(sample), self.vocab_size)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _window(self, sample: int) -> tuple[np.ndarray, Shard, int]:
        """Return the ids of a sample, (seq + 1,), its shard, and its offset there."""
        _, index, offset = self.source.locate(sample)
        if index not in self._open:
            if len(self._open) == _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[index] = ShardReader(self.source.shards[index])
        return self._open[index].read(offset, self.source.seq_len + 1), self.source.shards[index], offset

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def _check_ids(window: np.ndarray, shard: Shard, offset: int, vocab_size: int) -> None:
    if window.max() >= vocab_size:
        raise InputError(
            f"shard {shard.path} holds token id {window.max():,} at offset {offset + int(window.argmax()):,}, but the "
            f"model's vocabulary has {vocab_size:,} ids; another tokenizer made it: prepare the corpus again"
        )


def training_batches(
    windows: TrainingWindows,
    batch: _BatchPlan,
    *,
    rank: int,
    first_step: int,
    end_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_wait: Callable[[int], bool | None] = lambda step: None,
    all_reduce_min: Callable[[int], int] = lambda number: number,
    may_read: Callable[[list[Shard]], bool] = lambda shards: True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, both (batch, seq): `batch.accumulation_steps` pairs per step from first to end.

    A step begins when every node has the shards of all its samples. While a node waits for the Hub, all ranks compare
    their progress by `all_reduce_min` twice a second, so that none waits in an all-reduce until it times out, and call
    `on_wait` with the step; if it returns True, no batches follow those of the steps before. Nor do they if `may_read`
    returns False, which all ranks call with the shards that a step is the first to read. `num_workers` processes read
    ahead.
    """
    source = windows.source
    opened: set[int] = set()

    def samples_of_micro_steps() -> Iterator[list[int]]:
        ready = 0
        for step in range(first_step, end_step):
            needed = (step + 1) * batch.sequences_per_step
            while ready < needed:
                if source.ready() < needed:
                    source.refresh()
                ready = all_reduce_min(source.ready())
                if ready < needed:
                    if on_wait(step):
                        return
                    time.sleep(POLL_SECONDS)
            new = source.shards_of(range(needed - batch.sequences_per_step, needed)) - opened
            if new and not may_read([source.shards[index] for index in sorted(new)]):
                return
            opened.update(new)
            for micro_step in range(batch.accumulation_steps):
                yield list(batch.samples(step, micro_step, rank))

    loader = DataLoader(
        windows,
        batch_sampler=samples_of_micro_steps(),
        collate_fn=tuple,  # the dataset returns batches
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # starting the loader must not draw from the generator that dropout uses
    )
    try:
        yield from loader
    except InputError as error:
        # A worker process sends its error as a traceback; the last line is the error itself.
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def validation_batches(
    shard: Shard, *, seq_len: int, eval_tokens: int, batch_size: int, vocab_size: int, rank: int, num_processes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's share of the validation windows: inputs and targets, both (batch, seq).

    The windows are the first `eval_tokens` of the validation shard in order, the same for every run and any number of
    processes. Compiled and sharded models need batches of one shape and equally many on every rank, so missing rows
    are filled with ignored targets.
    """
    windows = validation_windows(shard, seq_len=seq_len, eval_tokens=eval_tokens)
    tokens = shard.read()
    per_pass = batch_size * num_processes
    for first in range(rank * batch_size, -(-windows // per_pass) * per_pass, per_pass):
        inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        targets = torch.full((batch_size, seq_len), IGNORED, dtype=torch.int64)
        for row, index in enumerate(range(first, min(first + batch_size, windows))):
            offset = index * seq_len
            window = tokens[offset : offset + seq_len + 1]
            _check_ids(window, shard, offset, vocab_size)
            ids = torch.from_numpy(window.astype(np.int64))
            inputs[row], targets[row] = ids[:-1], ids[1:]
        yield inputs, targets


def validation_windows(shard: Shard, *, seq_len: int, eval_tokens: int) -> int:
    """Return how many windows a validation scores: those of `eval_tokens`, or as many as the shard has.

    Raises:
        InputError: the shard does not hold one window.
    """
    available = (shard.tokens - 1) // seq_len
    if not available:
        raise InputError(
            f"validation shard {shard.path} holds {shard.tokens:,} tokens, but a window needs seq_len + 1 = "
            f"{seq_len + 1:,}; prepare the corpus with more val_tokens, or train with a shorter seq_len"
        )
    return min(available, max(1, eval_tokens // seq_len))
