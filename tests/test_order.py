"""The order of windows: a pure function that visits everything once."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batch import plan_batch
from training.data.order import Order, Window, permuted

shard_sizes = st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(lambda sizes: max(sizes) > 40)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_every_index_once(size: int, key: int) -> None:
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_permutation_is_the_same_on_every_machine() -> None:
    # Written down once: a change here would break the resumption of every run out there.
    assert [permuted(index, 10, 1234) for index in range(10)] == [1, 9, 4, 6, 7, 5, 2, 3, 0, 8]


def test_permutation_moves_indices_far_apart() -> None:
    size = 10_000
    jumps = [abs(permuted(index + 1, size, 7) - permuted(index, size, 7)) for index in range(2000)]
    # Two independent uniform places lie size/3 apart on average; 2,000 of them estimate that within a few percent.
    assert sum(jumps) / len(jumps) == pytest.approx(size / 3, rel=0.1)


@given(sizes=shard_sizes, seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_window_of_an_epoch_comes_exactly_once(sizes: list[int], seed: int, epoch: int) -> None:
    order = Order(sizes, seq_len=20, seed=seed)
    first = sum(order.windows_in_epoch(earlier) for earlier in range(epoch))
    windows = [order.locate(first + sample) for sample in range(order.windows_in_epoch(epoch))]
    assert {window.epoch for window in windows} == {epoch}
    assert len(set(windows)) == len(windows)
    targets = Counter(
        (window.shard, position) for window in windows for position in range(window.offset + 1, window.offset + 21)
    )
    assert set(targets.values()) == {1}
    assert all(0 < position < sizes[shard] for shard, position in targets)
    for shard, size in enumerate(sizes):
        covered = sum(1 for place in targets if place[0] == shard)
        # At most the shift and the incomplete last window are missing.
        assert covered > size - 1 - 2 * 20


def test_first_epoch_takes_shards_in_their_own_order() -> None:
    order = Order([100, 60, 80], seq_len=10, seed=3)
    shards = [order.locate(sample).shard for sample in range(order.windows_in_epoch(0))]
    assert shards == [0] * 9 + [1] * 5 + [2] * 7


def test_first_epoch_does_not_depend_on_later_shards() -> None:
    growing, finished = Order([100, 60], seq_len=10, seed=3), Order([100, 60, 80], seq_len=10, seed=3)
    assert [growing.locate(s) for s in range(14)] == [finished.locate(s) for s in range(14)]


def test_later_epochs_permute_shards_and_shift_windows() -> None:
    order = Order([1001] * 8, seq_len=100, seed=5)
    epochs = []
    sample = 0
    for epoch in range(4):
        epochs.append([order.locate(sample + place) for place in range(order.windows_in_epoch(epoch))])
        sample += order.windows_in_epoch(epoch)
    shard_orders = {tuple(dict.fromkeys(window.shard for window in windows)) for windows in epochs}
    assert len(shard_orders) == 4
    shifts = {tuple(sorted({w.offset % 100 for w in windows if w.shard == 0})) for windows in epochs}
    assert len(shifts) == 4
    assert all(len(shift) == 1 for shift in shifts)


def test_seeds_give_different_orders() -> None:
    def first_windows(seed: int) -> list[Window]:
        order = Order([10_000], seq_len=10, seed=seed)
        return [order.locate(sample) for sample in range(50)]

    assert first_windows(1) != first_windows(2)


def test_a_corpus_without_one_window_is_refused() -> None:
    with pytest.raises(ValueError, match="no training shard holds a window of 100 tokens"):
        Order([100, 50], seq_len=100, seed=0)


@given(
    num_processes=st.sampled_from([1, 2, 4, 8, 64, 1024]),
    per_device=st.sampled_from([1, 2, 4]),
    accumulation=st.sampled_from([1, 2, 3]),
    step=st.integers(0, 10**9),
)
@settings(max_examples=80, deadline=None)
def test_processes_and_accumulation_only_slice_the_batch(
    num_processes: int, per_device: int, accumulation: int, step: int
) -> None:
    sequences = num_processes * per_device * accumulation
    plan = plan_batch(tokens_per_step=sequences * 16, seq_len=16, per_device=per_device, num_processes=num_processes)
    taken = [
        sample
        for micro_step in range(plan.accumulation_steps)
        for rank in range(num_processes)
        for sample in plan.samples(step, micro_step, rank)
    ]
    assert taken == list(range(step * sequences, (step + 1) * sequences))
