"""The order of windows: a pure function that visits everything once."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.loading.order import Order, Permutation, Window
from training.step.batch_plan import plan_batch

shard_sizes = st.lists(st.integers(0, 400), min_size=1, max_size=5).filter(lambda sizes: max(sizes) > 40)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutation_visits_every_index_once(size: int, key: int) -> None:
    assert sorted(map(Permutation(size, key), range(size))) == list(range(size))


def test_permutation_is_the_same_on_every_machine() -> None:
    # Written down once: a change here would break the resumption of every run out there.
    assert list(map(Permutation(10, 1234), range(10))) == [1, 9, 4, 6, 7, 5, 2, 3, 0, 8]


def test_permutation_moves_indices_far_apart() -> None:
    size = 10_000
    permuted = list(map(Permutation(size, 7), range(2001)))
    jumps = [abs(after - before) for before, after in itertools.pairwise(permuted)]
    # Two independent uniform positions lie size/3 apart on average; 2,000 of them estimate that within a few percent.
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
        covered = sum(1 for target in targets if target[0] == shard)
        # At most the shift and the incomplete last window are not covered.
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
        epochs.append([order.locate(sample + index) for index in range(order.windows_in_epoch(epoch))])
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


def test_corpus_without_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no training shard holds a window of 100 \+ 1 tokens"):
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


# Simulated runs: 1,024 sequences per step on 1 to 1,024 processes, resumed on other numbers of processes.

WORLDS = [1, 2, 4, 8, 64, 1024]
SIZES = [9_000, 40_001, 25_000, 33]  # the last shard holds one window of 32


def windows_of_step(order: Order, step: int, world: int, per_device: int) -> list[list[Window]]:
    """The windows that each process takes in a step."""
    plan = plan_batch(tokens_per_step=1024 * 32, seq_len=32, per_device=per_device, num_processes=world)
    return [
        [
            order.locate(sample)
            for micro_step in range(plan.accumulation_steps)
            for sample in plan.samples(step, micro_step, rank)
        ]
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def single_process() -> list[set[Window]]:
    """The windows of each step of a run on one process, through two epochs and into the third."""
    order = Order(SIZES, seq_len=32, seed=11)
    return [set(windows_of_step(order, step, 1, 1)[0]) for step in range(6)]


@pytest.mark.parametrize("world", WORLDS)
def test_every_step_holds_the_same_windows_for_any_number_of_processes(
    world: int, single_process: list[set[Window]]
) -> None:
    order = Order(SIZES, seq_len=32, seed=11)
    for step, expected in enumerate(single_process):
        ranks = windows_of_step(order, step, world, per_device=1)
        windows = [window for rank in ranks for window in rank]
        assert len(set(windows)) == len(windows) == 1024  # no two processes take the same window
        assert set(windows) == expected


@pytest.mark.parametrize(("world", "per_device"), [(1, 1024), (2, 16), (2, 512), (8, 1), (8, 32), (64, 4), (64, 16)])
def test_every_step_holds_the_same_windows_for_any_accumulation(
    world: int, per_device: int, single_process: list[set[Window]]
) -> None:
    order = Order(SIZES, seq_len=32, seed=11)
    for step, expected in enumerate(single_process[:3]):
        assert {window for windows in windows_of_step(order, step, world, per_device) for window in windows} == expected


@given(worlds=st.lists(st.sampled_from(WORLDS), min_size=6, max_size=6))
@settings(max_examples=10, deadline=None)
def test_run_resumed_at_every_step_on_another_number_of_processes_sees_the_same_windows(worlds: list[int]) -> None:
    uninterrupted = Order(SIZES, seq_len=32, seed=11)
    for step, world in enumerate(worlds):
        resumed = Order(SIZES, seq_len=32, seed=11)  # only the step is carried over
        expected = {uninterrupted.locate(sample) for sample in range(1024 * step, 1024 * (step + 1))}
        assert {window for windows in windows_of_step(resumed, step, world, 1) for window in windows} == expected


def test_simulated_epochs_visit_every_window_once_and_differ_from_each_other() -> None:
    order = Order(SIZES, seq_len=32, seed=11)
    starts = [0, *(sum(order.windows_in_epoch(e) for e in range(epoch + 1)) for epoch in range(3))]
    epochs = [[order.locate(sample) for sample in range(*pair)] for pair in itertools.pairwise(starts)]
    for epoch, windows in enumerate(epochs):
        assert len(set(windows)) == len(windows)
        assert {window.epoch for window in windows} == {epoch}
        # Neighboring windows are adjacent: they cover the shard but for the shift and an incomplete window at its end.
        for shard, size in enumerate(SIZES):
            offsets = sorted(window.offset for window in windows if window.shard == shard)
            assert offsets == list(range(offsets[0], offsets[0] + 32 * len(offsets), 32)) if offsets else size <= 64
            assert not offsets or (offsets[0] < 32 and offsets[-1] + 33 > size - 32)
    sequences = [[(window.shard, window.offset) for window in windows] for windows in epochs]
    assert sequences[0] != sequences[1] != sequences[2] != sequences[0]
    cuts = [{(shard, offset % 32) for shard, offset in sequence} for sequence in sequences]
    assert cuts[0] != cuts[1] != cuts[2]


@given(sizes=shard_sizes, more=st.lists(st.integers(0, 400), max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_shards_added_later_do_not_change_the_first_epoch(sizes: list[int], more: list[int], seed: int) -> None:
    growing, finished = Order(sizes, seq_len=20, seed=seed), Order([*sizes, *more], seq_len=20, seed=seed)
    windows = range(growing.windows_in_epoch(0))
    assert [growing.locate(sample) for sample in windows] == [finished.locate(sample) for sample in windows]
