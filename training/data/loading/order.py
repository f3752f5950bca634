"""Sample index → window of tokens, as a pure function of the seed, the sequence length and the shards' sizes.

A run's place in the data is one integer: nothing is stored, nothing is skipped, and any number of processes can ask.
Epoch 0 takes the shards in their own order, so that it can begin before the last one exists; later epochs permute
them. Inside a shard the windows are permuted, and from epoch 1 on each epoch shifts where windows begin, so that no
two epochs cut the text alike. Permutations are computed one index at a time by a Feistel network with cycle walking
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): no buffer, and the same on every platform and
library version. One look-up costs some five microseconds.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*parts: int) -> int:
    """64 bits that depend on every part and on their order (the finaliser of SplitMix64, chained)."""
    state = 0
    for part in parts:
        state = _mixed_in(state, part)
    return state


def _mixed_in(state: int, part: int) -> int:
    state = (state + part + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class Permutation:
    """The permutation of `range(size)` that `key` names, an index at a time: a bijection for every key."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        # What a round mixes is the key, its turn and one half of the index; the first two are mixed once.
        self._states = [mix(key, turn) for turn in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return where `index` stands."""
        half, low = self._half, self._low
        while True:
            left, right = index >> half, index & low
            for state in self._states:
                left, right = right, left ^ (_mixed_in(state, right) & low)
            index = left << half | right
            if index < self.size:
                return index


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` stands in the permutation of `range(size)` that `key` names."""
    return Permutation(size, key)(index)


class Window(NamedTuple):
    """Where a sample's `seq_len + 1` tokens begin: the epoch, the training shard's number, and the offset in it."""

    epoch: int
    shard: int
    offset: int


class Order:
    """The order in which windows of `seq_len` tokens are drawn from training shards.

    A window is `seq_len + 1` tokens long, its inputs and, one further, its targets; neighbours share one token, so
    every token but a shard's first is a target once an epoch (the last, incomplete window of a shard is left out).

    Arguments:
        shard_tokens: tokens in each training shard, in the shards' order.
        seq_len: tokens in a window's inputs.
        seed: names the permutations.

    Raises:
        ValueError: no shard holds a window.
    """

    def __init__(self, shard_tokens: Sequence[int], *, seq_len: int, seed: int) -> None:
        self.shard_tokens = tuple(shard_tokens)
        self.seq_len = seq_len
        self.seed = seed
        # Samples before epoch e; epochs are added as they are asked for.
        self._epoch_starts = [0]
        self._ends: dict[int, list[int]] = {}
        self._latest: tuple[int, int, Permutation, int] | None = None
        if not self.windows_in_epoch(0):
            raise ValueError(f"no training shard holds a window of {seq_len:,} tokens and one more")

    def windows_in_epoch(self, epoch: int) -> int:
        """Samples in `epoch`."""
        return self._shard_ends(epoch)[-1] if self.shard_tokens else 0

    def locate(self, sample: int) -> Window:
        """The window of sample number `sample`, counted from 0 over all epochs."""
        epoch = self._epoch_of(sample)
        place = sample - self._epoch_starts[epoch]
        ends = self._shard_ends(epoch)
        turn = bisect.bisect_right(ends, place)
        first = ends[turn - 1] if turn else 0
        shard = self._shard_at(epoch, turn)
        permutation, shift = self._inside(epoch, shard, ends[turn] - first)
        return Window(epoch, shard, shift + permutation(place - first) * self.seq_len)

    def _inside(self, epoch: int, shard: int, windows: int) -> tuple[Permutation, int]:
        """How the windows of a shard are permuted and shifted; kept, since the next sample is in the same shard."""
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
        """Samples of `epoch` up to the end of each shard, in the order in which the epoch takes the shards."""
        if epoch not in self._ends:
            shards = (self._shard_at(epoch, turn) for turn in range(len(self.shard_tokens)))
            self._ends[epoch] = list(itertools.accumulate(self._windows(epoch, shard) for shard in shards))
        return self._ends[epoch]

    def _shard_at(self, epoch: int, turn: int) -> int:
        return turn if epoch == 0 else permuted(turn, len(self.shard_tokens), mix(self.seed, 2, epoch))

    def _shift(self, epoch: int, shard: int) -> int:
        if epoch == 0:
            return 0
        # A shard that barely holds one window must not lose it to the shift.
        room = self.shard_tokens[shard] - self.seq_len
        return mix(self.seed, 3, epoch, shard) % min(self.seq_len, room) if room > 0 else 0

    def _windows(self, epoch: int, shard: int) -> int:
        return max(0, (self.shard_tokens[shard] - 1 - self._shift(epoch, shard)) // self.seq_len)
