"""Sample index → window of tokens, as a pure function of the seed, the sequence length and the shards' sizes.

Resuming needs one integer, and no index file. Epoch 0 takes the shards in their own order, so that it can begin before
the last one exists; later epochs permute them. The windows within a shard are permuted too, and from epoch 1 on each
epoch shifts where windows begin, so that no two epochs cut the text at the same positions. A Feistel network with cycle
walking computes the permutation of one index at a time (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002): it needs no buffer, and is the same on every platform. One lookup takes about five microseconds.
"""

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*parts: int) -> int:
    """A 64-bit hash of the parts in their order (the finalizer of SplitMix64, chained)."""
    return functools.reduce(_mix_in, parts, 0)


def _mix_in(state: int, part: int) -> int:
    state = (state + part + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class Permutation:
    """The permutation of `range(size)` with the given key, computed one index at a time."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        # A round mixes the key, its number and one half of the index; the first two are mixed in advance.
        self._states = [mix(key, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return the position to which `index` is permuted."""
        half, low = self._half, self._low
        while True:
            left, right = index >> half, index & low
            for state in self._states:
                left, right = right, left ^ (_mix_in(state, right) & low)
            index = left << half | right
            if index < self.size:
                return index


class Window(NamedTuple):
    """Where the `seq_len + 1` tokens of a sample begin: the epoch, the index of the training shard, and the offset."""

    epoch: int
    shard: int
    offset: int


class Order:
    """The order in which windows of `seq_len` tokens are drawn from training shards.

    A window has `seq_len + 1` tokens: the inputs, and the targets shifted by one. Neighbors share one token, so every
    token but a shard's first is a target once per epoch. The last, incomplete window of a shard is dropped.

    Raises:
        ValueError: no shard holds a window.
    """

    def __init__(self, shard_tokens: Sequence[int], *, seq_len: int, seed: int) -> None:
        self.shard_tokens = tuple(shard_tokens)
        self.seq_len = seq_len
        self.seed = seed
        self._epoch_starts = [0]  # first sample of each epoch, extended on demand
        self._ends: dict[int, list[int]] = {}
        self._latest: tuple[int, int, Permutation, int] | None = None
        if not self.windows_in_epoch(0):
            raise ValueError(f"no training shard holds a window of {seq_len:,} + 1 tokens")

    def windows_in_epoch(self, epoch: int) -> int:
        """Return the number of windows in `epoch`."""
        return self._shard_ends(epoch)[-1] if self.shard_tokens else 0

    def locate(self, sample: int) -> Window:
        """Return the window of `sample`, counted from 0 over all epochs."""
        epoch = self._epoch_of(sample)
        index = sample - self._epoch_starts[epoch]
        ends = self._shard_ends(epoch)
        position = bisect.bisect_right(ends, index)
        first = ends[position - 1] if position else 0
        shard = self._shard_at(epoch, position)
        permutation, shift = self._within(epoch, shard, ends[position] - first)
        return Window(epoch, shard, shift + permutation(index - first) * self.seq_len)

    def _within(self, epoch: int, shard: int, windows: int) -> tuple[Permutation, int]:
        """Return the permutation and the shift of a shard's windows; cached, as the next sample uses them again."""
        if self._latest is None or self._latest[:2] != (epoch, shard):
            permutation = Permutation(windows, mix(self.seed, 1, epoch, shard))
            self._latest = (epoch, shard, permutation, self._shift(epoch, shard))
        return self._latest[2:]

    def _epoch_of(self, sample: int) -> int:
        while self._epoch_starts[-1] <= sample:
            last = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[last] + self.windows_in_epoch(last))
        return bisect.bisect_right(self._epoch_starts, sample) - 1

    def _shard_ends(self, epoch: int) -> list[int]:
        """Return how many windows of `epoch` precede the end of each shard, in the epoch's order of shards."""
        if epoch not in self._ends:
            shards = (self._shard_at(epoch, position) for position in range(len(self.shard_tokens)))
            self._ends[epoch] = list(itertools.accumulate(self._windows(epoch, shard) for shard in shards))
        return self._ends[epoch]

    def _shard_at(self, epoch: int, position: int) -> int:
        if epoch == 0:
            return position
        return Permutation(len(self.shard_tokens), mix(self.seed, 2, epoch))(position)

    def _shift(self, epoch: int, shard: int) -> int:
        if epoch == 0:
            return 0
        # The shift must not cost a shard its only window.
        room = self.shard_tokens[shard] - self.seq_len
        return mix(self.seed, 3, epoch, shard) % min(self.seq_len, room) if room > 0 else 0

    def _windows(self, epoch: int, shard: int) -> int:
        return max(0, (self.shard_tokens[shard] - 1 - self._shift(epoch, shard)) // self.seq_len)
