"""Batches of a rank, and the data that the loader refuses."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common.cli_errors import InputError
from training.data.loading.loader import IGNORED, TrainingShards, TrainingWindows, training_batches, validation_batches
from training.data.loading.order import Order
from training.data.shards.shard_reader import Shard, ShardFolder
from training.step.batch_plan import plan_batch

SEQ = 16


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Three shards of 500, 300 and 400 tokens; every token encodes its shard and offset."""
    made = []
    for number, size in enumerate([500, 300, 400]):
        path = tmp_path / f"count_train_{number:06d}.npy"
        np.save(path, (number * 1000 + np.arange(size)).astype("<u2"))
        made.append(Shard(path, "train", size))
    return made


def order_of(shards: list[Shard]) -> Order:
    return Order([shard.tokens for shard in shards], seq_len=SEQ, seed=1)


def source(shards: list[Shard]) -> TrainingShards:
    return TrainingShards(ShardFolder(shards[0].path.parent, tuple(shards), None), seq_len=SEQ, seed=1)


def stream(shards: list[Shard], *, per_device: int, ranks: int, steps: range, workers: int = 0) -> list[list[int]]:
    """First token of every window of each step, over all ranks."""
    plan = plan_batch(tokens_per_step=16 * SEQ, seq_len=SEQ, per_device=per_device, num_processes=ranks)
    windows = TrainingWindows(source(shards), vocab_size=4000)
    per_step: list[list[int]] = [[] for _ in steps]
    for rank in range(ranks):
        batches = list(
            training_batches(windows, plan, rank=rank, first_step=steps.start, end_step=steps.stop, num_workers=workers)
        )
        assert len(batches) == len(steps) * plan.accumulation_steps
        for number, (inputs, _) in enumerate(batches):
            assert inputs.shape == (per_device, SEQ)
            per_step[number // plan.accumulation_steps] += inputs[:, 0].tolist()
    return [sorted(firsts) for firsts in per_step]


def test_targets_are_the_inputs_shifted_by_one_at_the_offset_that_the_order_gives(shards: list[Shard]) -> None:
    order = order_of(shards)
    windows = TrainingWindows(source(shards), vocab_size=4000)
    for sample in range(windows.source.order.windows_in_epoch(0)):
        window = order.locate(sample)
        inputs, targets = windows[sample]
        expected = window.shard * 1000 + window.offset + np.arange(SEQ + 1)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == expected[:-1].tolist()
        assert targets.tolist() == expected[1:].tolist()


@pytest.mark.parametrize(("per_device", "ranks"), [(4, 1), (16, 1), (4, 2), (2, 4), (1, 8)])
def test_steps_hold_the_same_samples_for_any_split(shards: list[Shard], per_device: int, ranks: int) -> None:
    one = stream(shards, per_device=1, ranks=1, steps=range(0, 9))
    assert stream(shards, per_device=per_device, ranks=ranks, steps=range(0, 9)) == one


def test_resumed_stream_equals_uninterrupted_stream(shards: list[Shard]) -> None:
    uninterrupted = stream(shards, per_device=4, ranks=1, steps=range(0, 9))
    assert stream(shards, per_device=2, ranks=4, steps=range(5, 9)) == uninterrupted[5:]


def test_worker_processes_yield_the_same_batches(shards: list[Shard]) -> None:
    without = stream(shards, per_device=4, ranks=1, steps=range(0, 3))
    assert stream(shards, per_device=4, ranks=1, steps=range(0, 3), workers=1) == without


def test_starting_a_loader_does_not_change_the_random_state_of_dropout(shards: list[Shard]) -> None:
    plan = plan_batch(tokens_per_step=4 * SEQ, seq_len=SEQ, per_device=4, num_processes=1)
    windows = TrainingWindows(source(shards), vocab_size=4000)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(training_batches(windows, plan, rank=0, first_step=0, end_step=2))
    assert torch.equal(torch.rand(3), expected)


def test_windows_are_pickled_without_open_files(shards: list[Shard]) -> None:
    windows = TrainingWindows(source(shards), vocab_size=4000)
    before = windows[3]
    assert len(pickle.dumps(windows)) < 4000
    assert torch.equal(pickle.loads(pickle.dumps(windows))[3][0], before[0])


def test_id_outside_the_vocabulary_is_refused_with_its_offset(shards: list[Shard]) -> None:
    # The last complete window of the last shard ends at 384.
    windows = TrainingWindows(source(shards), vocab_size=2384)
    with pytest.raises(InputError, match=r"count_train_000002.npy holds token id 2,384 at offset 384, .* 2,384 ids"):
        [windows[sample] for sample in range(windows.source.order.windows_in_epoch(0))]


@pytest.mark.parametrize("workers", [0, 1])
def test_invalid_id_during_training_is_a_one_line_error(workers: int, shards: list[Shard]) -> None:
    plan = plan_batch(tokens_per_step=4 * SEQ, seq_len=SEQ, per_device=4, num_processes=1)
    windows = TrainingWindows(source(shards), vocab_size=100)
    with pytest.raises(InputError, match=r"^shard .*count_train_000000.npy holds token id") as caught:
        list(training_batches(windows, plan, rank=0, first_step=0, end_step=9, num_workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (4, 1), (7, 1), (2, 3), (5, 4)])
def test_validation_scores_the_same_tokens_for_any_split(shards: list[Shard], batch_size: int, ranks: int) -> None:
    seen: list[int] = []
    counts = set()
    for rank in range(ranks):
        batches = list(
            validation_batches(
                shards[0],
                seq_len=SEQ,
                eval_tokens=13 * SEQ + 5,
                batch_size=batch_size,
                vocab_size=4000,
                rank=rank,
                num_processes=ranks,
            )
        )
        counts.add(len(batches))
        assert all(inputs.shape == targets.shape == (batch_size, SEQ) for inputs, targets in batches)
        for inputs, targets in batches:
            counted = targets != IGNORED
            assert torch.equal(targets[counted], inputs[counted] + 1)
            seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, 13 * SEQ + 1))
    assert len(counts) == 1  # every rank takes part in the same number of forward passes


def test_validation_shard_without_a_window_is_refused(shards: list[Shard]) -> None:
    with pytest.raises(InputError, match=r"holds 300 tokens, but a window needs seq_len \+ 1 = 501"):
        next(
            validation_batches(
                shards[1], seq_len=500, eval_tokens=500, batch_size=1, vocab_size=4000, rank=0, num_processes=1
            )
        )
