"""A folder that a producer is filling: the order is stable, batches continue, checkpoints match."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.growing_folder import GrowingFolder, restore

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import TrainerState
from training.checkpoints.resume import refuse_other_data, shard_identities
from training.data.loading.loader import TrainingShards, TrainingWindows, training_batches
from training.data.shards.shard_reader import Shard, ShardFolder
from training.recipe import Recipe
from training.step.batch_plan import plan_batch

Make = Callable[..., Recipe]


@pytest.fixture
def growing(shard_folder: Path, tmp_path: Path) -> GrowingFolder:
    return GrowingFolder(shard_folder, tmp_path / "growing")


def test_partial_folder_and_complete_folder_have_the_same_order(growing: GrowingFolder, shard_folder: Path) -> None:
    finished = TrainingShards(ShardFolder.open(shard_folder), seq_len=32, seed=5)
    shards = TrainingShards(growing.show(2), seq_len=32, seed=5)
    assert len(growing.complete_manifest.shards) > 3
    sample, number = 0, 2
    windows = []
    while sample < 3 * finished.order.windows_in_epoch(0):
        if sample >= shards.ready():
            shards.refresh()
            assert sample >= shards.ready()
            number += 1
            restore(growing, shard_folder, number)
            shards.refresh()
            assert sample < shards.ready()
        windows.append(shards.locate(sample))
        sample += 1
    assert windows == [finished.locate(sample) for sample in range(len(windows))]
    assert number == len(growing.complete_manifest.shards)
    assert {window.epoch for window in windows} >= {0, 1, 2}


def test_second_epoch_waits_until_the_folder_is_complete(growing: GrowingFolder, shard_folder: Path) -> None:
    shards = TrainingShards(growing.show(3), seq_len=32, seed=5)
    first_of_epoch_1 = shards.order.windows_in_epoch(0)
    shards.refresh()
    assert shards.ready() == first_of_epoch_1
    # Every shard exists now, but the manifest does not list it as complete yet.
    growing.complete_manifest = dataclasses.replace(
        growing.complete_manifest, shards=growing.complete_manifest.shards[:3]
    )
    restore(growing, shard_folder, 3)
    shards.refresh()
    assert shards.ready() > first_of_epoch_1
    assert shards.locate(first_of_epoch_1).epoch == 1


def first_tokens(batches: Iterator, steps: int) -> list[list[int]]:
    return [next(batches)[0][:, :3].flatten().tolist() for _ in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_continue_into_shards_added_later(workers: int, growing: GrowingFolder, shard_folder: Path) -> None:
    plan = plan_batch(tokens_per_step=16 * 32, seq_len=32, per_device=16, num_processes=1)
    finished = TrainingShards(ShardFolder.open(shard_folder), seq_len=32, seed=5)
    steps = 2 * finished.order.windows_in_epoch(0) // 16
    complete = training_batches(TrainingWindows(finished, 300), plan, rank=0, first_step=0, end_step=steps)
    expected = first_tokens(complete, steps)

    shards = TrainingShards(growing.show(2), seq_len=32, seed=5)
    waited: list[int] = []

    def on_wait(step: int) -> None:
        waited.append(step)
        restore(growing, shard_folder, len(shards.shards) + 2)

    batches = training_batches(
        TrainingWindows(shards, 300), plan, rank=0, first_step=0, end_step=steps, num_workers=workers, on_wait=on_wait
    )
    assert first_tokens(batches, steps) == expected
    assert list(batches) == []
    assert waited


def test_all_ranks_wait_for_a_step_whose_last_sample_is_not_ready(growing: GrowingFolder) -> None:
    class StopError(Exception):
        pass

    def on_wait(step: int) -> None:
        raise StopError(step)

    shards = TrainingShards(growing.show(2), seq_len=32, seed=5)
    plan = plan_batch(tokens_per_step=16 * 32, seq_len=32, per_device=4, num_processes=2)
    whole_steps = shards.order.windows_in_epoch(0) // 16
    for rank in range(2):
        batches = training_batches(
            TrainingWindows(shards, 300), plan, rank=rank, first_step=0, end_step=10**6, on_wait=on_wait
        )
        for _ in range(whole_steps * plan.accumulation_steps):
            next(batches)
        with pytest.raises(StopError, match=str(whole_steps)):
            next(batches)


def test_node_with_all_shards_waits_for_one_that_has_fewer(growing: GrowingFolder, shard_folder: Path) -> None:
    plan = plan_batch(tokens_per_step=16 * 32, seq_len=32, per_device=16, num_processes=1)
    elsewhere, waited, asked = [3 * 16], [], []

    def on_wait(step: int) -> None:
        waited.append(step)
        if len(waited) == 2:
            elsewhere[0] = 8 * 16

    def all_reduce_min(number: int) -> int:
        asked.append(number)
        return min(number, elsewhere[0])

    shards = TrainingShards(ShardFolder.open(shard_folder), seq_len=32, seed=5)
    batches = training_batches(
        TrainingWindows(shards, 300),
        plan,
        rank=0,
        first_step=0,
        end_step=8,
        on_wait=on_wait,
        all_reduce_min=all_reduce_min,
    )
    assert len(list(batches)) == 8
    assert waited == [3, 3]
    assert len(asked) == 4  # at the start, and at the step that the other node lacks: no all-reduce at every step


def test_each_shard_is_checked_before_the_first_step_that_reads_it(shard_folder: Path) -> None:
    plan = plan_batch(tokens_per_step=16 * 32, seq_len=32, per_device=16, num_processes=1)
    shards = TrainingShards(ShardFolder.open(shard_folder), seq_len=32, seed=5)
    asked: list[list[int]] = []

    def may_read(wanted: list[Shard]) -> bool:
        asked.append([shards.shards.index(shard) for shard in wanted])
        return asked[-1] != [2]

    batches = training_batches(
        TrainingWindows(shards, 300), plan, rank=0, first_step=0, end_step=10**6, may_read=may_read
    )
    assert len(list(batches)) == (9_000 - 1) // 32 * 2 // 16  # the steps before the third shard
    assert asked == [[0], [1], [2]]


# Resuming from a checkpoint


def test_checkpoint_resumes_over_a_folder_with_more_or_fewer_shards(growing: GrowingFolder, tiny_recipe: Make) -> None:
    from training.data.tokenization.tokenizer import Tokenizer

    tokenizer, recipe = Tokenizer.load(growing.path), tiny_recipe()
    two, three = growing.show(3), shard_identities(growing.show(3))
    assert len(three) == 3

    def state(shards: list[str], tokens: int) -> TrainerState:
        return TrainerState(1, tokens, tokenizer.fingerprint, shards, recipe.to_dict(), 1)

    refuse_other_data(state(three, 300), two, tokenizer, recipe)
    refuse_other_data(state(three[:2], 300), two, tokenizer, recipe)  # it has grown
    refuse_other_data(state([*three, "later"], 300), two, tokenizer, recipe)  # it is being made again, and has fewer
    with pytest.raises(
        InputError, match=r"other shards than the checkpoint's run used \(the validation shard was sha256 other"
    ):
        refuse_other_data(state(["other", *three[1:]], 300), two, tokenizer, recipe)
    with pytest.raises(InputError, match="other shards"):  # its second epoch had these shards only
        refuse_other_data(state(three[:2], 10_000), two, tokenizer, recipe)
    complete = growing.show(3, complete=True)
    with pytest.raises(InputError, match=r"other shards .*\(3 training shards then, 2 now\)"):
        refuse_other_data(state([*three, "later"], 300), complete, tokenizer, recipe)
    with pytest.raises(InputError, match="another tokenizer"):
        refuse_other_data(dataclasses.replace(state(three, 1), tokenizer_fingerprint="x"), two, tokenizer, recipe)
