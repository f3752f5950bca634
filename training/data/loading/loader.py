"""This rank's batches, training and validation.

The loader knows its rank, so it is never passed to `accelerator.prepare`: that would shard it a second time, or feed
rank 0's stream to all. Reading is a system call a row; `torch.utils.data.DataLoader` adds read-ahead processes
and pinning.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.cli_errors import InputError
from training.data.loading.training_shards import SECONDS_BETWEEN_LOOKS, TrainingShards
from training.data.shards.shard_reader import Shard, ShardReader
from training.step.batch_plan import BatchPlan

IGNORED = -100  # the target that torch's cross-entropy, and ours, leave out
_OPEN_SHARDS = 8  # samples go through one shard after the other


class TrainingWindows(Dataset[tuple[Tensor, Tensor]]):
    """Sample index → inputs (seq,) and targets (seq,), both int64, the targets already shifted.

    Raises:
        InputError: a token id that the model's vocabulary does not have; the shard and the place are named.
    """

    def __init__(self, source: TrainingShards, vocab_size: int) -> None:
        self.source = source
        self.vocab_size = vocab_size
        self._open: dict[int, ShardReader] = {}  # by shard; each read-ahead process opens its own

    def __len__(self) -> int:
        """Samples of the first epoch, as far as its shards are there; later epochs go on behind it."""
        return self.source.order.windows_in_epoch(0)

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([sample])
        return inputs[0], targets[0]

    def __getitems__(self, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch at once, (batch, seq) each, which spares a tensor for every row and their stacking."""
        seq_len = self.source.seq_len
        inputs = np.empty((len(samples), seq_len), dtype=np.int64)
        targets = np.empty_like(inputs)
        for row, sample in enumerate(samples):
            window = self._window(sample)[0]
            inputs[row], targets[row] = window[:-1], window[1:]
        if max(inputs.max(), targets.max()) >= self.vocab_size:
            for sample in samples:
                _checked(*self._window(sample), self.vocab_size)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _window(self, sample: int) -> tuple[np.ndarray, Shard, int]:
        """The ids of a sample, (seq + 1,), the shard, and where in it they are."""
        _, number, offset = self.source.locate(sample)
        if number not in self._open:
            if len(self._open) == _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
            self._open[number] = ShardReader(self.source.shards[number])
        return self._open[number].read(offset, self.source.seq_len + 1), self.source.shards[number], offset

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def _checked(window: np.ndarray, shard: Shard, offset: int, vocab_size: int) -> np.ndarray:
    if window.max() >= vocab_size:
        place = offset + int(window.argmax())
        raise InputError(
            f"shard {shard.path} holds token id {window.max():,} at {place:,}, but the model's vocabulary has "
            f"{vocab_size:,} ids; it was made with another tokenizer: prepare the corpus again"
        )
    return window


def _as_it_is(batch: Any) -> Any:
    return batch


class _RankBatches:
    """Lists of sample indices for `DataLoader(batch_sampler=…)`, one for each of this rank's forward passes.

    A step is begun when the shards of all its samples are there, on every node: a node that waits for the Hub tells the
    others so twice a second, and none waits for it in an exchange that runs into a time-out.
    """

    def __init__(
        self,
        plan: BatchPlan,
        rank: int,
        first_step: int,
        end_step: int,
        source: TrainingShards,
        on_wait: Callable[[int], None],
        least: Callable[[int], int],
    ) -> None:
        self.plan, self.rank, self.first_step, self.end_step = plan, rank, first_step, end_step
        self.source, self.on_wait, self.least = source, on_wait, least

    def __len__(self) -> int:
        return (self.end_step - self.first_step) * self.plan.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        ready = 0
        for step in range(self.first_step, self.end_step):
            needed = (step + 1) * self.plan.sequences_per_step
            while ready < needed:
                self.source.holds(needed - 1)
                ready = self.least(self.source.ready())
                if ready < needed:
                    self.on_wait(step)
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            for micro_step in range(self.plan.accumulation_steps):
                yield list(self.plan.samples(step, micro_step, self.rank))


def training_batches(
    windows: TrainingWindows,
    plan: BatchPlan,
    *,
    rank: int,
    first_step: int,
    end_step: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_wait: Callable[[int], None] = lambda step: None,
    least: Callable[[int], int] = lambda number: number,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, both (batch, seq): `plan.accumulation_steps` pairs for each step from first to end.

    While the shards of a step are not there yet, `on_wait` is called with the step, twice a second. `least` returns the
    smallest of all processes' numbers; all of them call it at the same steps.
    """
    loader = DataLoader(
        windows,
        batch_sampler=_RankBatches(plan, rank, first_step, end_step, windows.source, on_wait, least),
        collate_fn=_as_it_is,  # they come as batches
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A generator of its own: starting the loader must not draw from the one that dropout uses.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except InputError as error:
        # A read-ahead process sends its error as a report of many lines; the last one is the error itself.
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from None


def validation_batches(
    shard: Shard, *, seq_len: int, eval_tokens: int, batch_size: int, vocab_size: int, rank: int, num_processes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the validation windows: inputs and targets, both (batch, seq).

    The windows are the first `eval_tokens` of the validation shard in order, the same for every run and any number of
    processes. All batches have one shape and all ranks have equally many, because compiled and sharded models need
    that; what is missing is filled up with ignored targets.
    """
    windows = validation_windows(shard, seq_len=seq_len, eval_tokens=eval_tokens)
    tokens = shard.read()
    for first in range(rank * batch_size, _round_up(windows, batch_size * num_processes), batch_size * num_processes):
        inputs = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        targets = torch.full((batch_size, seq_len), IGNORED, dtype=torch.int64)
        for row, window in enumerate(range(first, min(first + batch_size, windows))):
            offset = window * seq_len
            checked = _checked(tokens[offset : offset + seq_len + 1], shard, offset, vocab_size)
            cut = torch.from_numpy(checked.astype(np.int64))
            inputs[row], targets[row] = cut[:-1], cut[1:]
        yield inputs, targets


def validation_windows(shard: Shard, *, seq_len: int, eval_tokens: int) -> int:
    """How many windows a validation scores: `eval_tokens` of them, or as many as the shard has.

    Raises:
        InputError: the shard does not hold one window.
    """
    available = (shard.tokens - 1) // seq_len
    if not available:
        raise InputError(
            f"validation shard {shard.path} holds {shard.tokens:,} tokens, expected at least seq_len + 1 = "
            f"{seq_len + 1:,}; prepare the corpus with more val_tokens, or train with a shorter seq_len"
        )
    return min(available, max(1, eval_tokens // seq_len))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
