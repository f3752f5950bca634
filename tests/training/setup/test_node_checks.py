"""Nodes wait for each other and verify that they match before a run starts; threads stand in for nodes."""

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.growing_folder import GrowingFolder, restore

from common import token_files
from common.atomic_files import file_sha256
from common.cli_errors import InputError
from common.folder_lock import locked
from common.ranks import Ranks
from training.data.producing.background_producer import BackgroundProducer
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.loop import train
from training.recipe import Recipe
from training.setup.plan import SOURCES, Plan, check_nodes_match, hash_of_files, plan_run
from training.setup.training_data import wait_for_shards

Make = Callable[..., Recipe]

NO_MATCH = "^the nodes do not match: "


class TwoNodes:
    """Plans of one run, made at the same time; a node that waits for one that has exited fails."""

    def __init__(self) -> None:
        self._values: list[Any] = [None, None]
        self._barrier = threading.Barrier(2, timeout=30)
        self._threads = ThreadPoolExecutor(2)
        self.producers = [BackgroundProducer(lambda line: None) for _ in range(2)]

    def gather_object(self, rank: int) -> Callable[[list[Any]], list[Any]]:
        def gather_object(values: list[Any]) -> list[Any]:
            self._values[rank] = values[0]
            self._barrier.wait()
            every_rank = list(self._values)
            self._barrier.wait()
            return every_rank

        return gather_object

    def plan(self, *recipes: Recipe) -> list[Future[Plan]]:
        return [
            self._threads.submit(plan_run, recipe, self.producers[rank], gather_object=self.gather_object(rank))
            for rank, recipe in enumerate(recipes)
        ]

    def close(self) -> None:
        for producer in self.producers:
            producer.stop()
        self._threads.shutdown()


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    # numpy parses a header as Python code, which Python 3.11 cannot do in two threads at once.
    parse, one_at_a_time = token_files._npy_header, threading.Lock()

    def parse_alone(*arguments: Any) -> Any:
        with one_at_a_time:
            return parse(*arguments)

    monkeypatch.setattr(token_files, "_npy_header", parse_alone)
    nodes = TwoNodes()
    yield nodes
    nodes.close()


def folder_with_another_shard(shard_folder: Path, path: Path) -> Path:
    """A consistent copy whose first training shard has other content."""
    shutil.copytree(shard_folder, path)
    manifest = Manifest.read(path)
    assert manifest is not None
    shards = list(manifest.shards)
    file = path / shards[1].file
    np.save(file, np.load(file)[::-1])
    shards[1] = dataclasses.replace(shards[1], sha256=file_sha256(file))
    dataclasses.replace(manifest, shards=tuple(shards)).write(path)
    return path


def assert_fails(plan: Future[Plan], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan.result()
    assert "\n" not in str(caught.value)


def test_nodes_with_the_same_data_start(nodes: TwoNodes, tiny_recipe: Make, shard_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_folder, tmp_path / "copy")
    plans = nodes.plan(tiny_recipe(), tiny_recipe(data_dir=str(tmp_path / "copy")))
    assert [plan.result().run.total_steps for plan in plans] == [12, 12]


def test_other_shards_on_a_node_are_an_error_on_all(
    nodes: TwoNodes, tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    other = folder_with_another_shard(shard_folder, tmp_path / "other")
    for plan in nodes.plan(tiny_recipe(), tiny_recipe(data_dir=str(other))):
        assert_fails(
            plan,
            NO_MATCH + "data: first training shard is [0-9a-f]+ on rank 0, [0-9a-f]+ on rank 1; .* copy both",
        )


def test_tokenizers_trained_on_each_node_are_an_error_on_all(
    nodes: TwoNodes, tiny_recipe: Make, tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "quite another text than theirs"}\n' * 3000)
    theirs = {"corpus": str(tmp_path / "c.jsonl"), "tokenizer": "train:275", "data_dir": str(tmp_path / "data")}
    ours = {"tokenizer": "train:275", "data_dir": str(tmp_path / "ours")}
    for plan in nodes.plan(tiny_recipe(**ours), tiny_recipe(**theirs)):
        assert_fails(plan, NO_MATCH + "data: ")


def test_shards_without_a_manifest_are_compared_by_their_ids(
    nodes: TwoNodes, tiny_recipe: Make, tmp_path: Path
) -> None:
    recipes = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, size in (("x_val_000000", 500), ("x_train_000001", 3000)):
            np.save(folder / f"{name}.npy", np.full(size, number, dtype="<u2"))
        recipes.append(tiny_recipe(data_dir=str(folder), tokenizer=tiny_recipe().data_dir))
    for plan in nodes.plan(*recipes):
        assert_fails(plan, NO_MATCH + "data: ")


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"learning_rate": 1e-4}, "learning_rate is 0.003 on rank 0, 0.0001 on rank 1;"),
        ({"max_steps": 13}, "total steps is 12 on rank 0, 13 on rank 1; max_steps is 12 on rank 0, 13 on rank 1;"),
        ({"init_from": "other"}, "initial weights is [0-9a-f]+ on rank 0, [0-9a-f]+ on rank 1;"),
        ({"eval_data_dir": "other"}, "items of eval_tasks is [0-9a-f]+ on rank 0, [0-9a-f]+ on rank 1;"),
        ({"init_from": "same", "eval_data_dir": "same", "report_to": ["tensorboard"]}, None),
    ],
)
def test_other_recipes_on_a_node_are_an_error_on_all(
    difference: dict[str, object],
    message: str | None,
    nodes: TwoNodes,
    tiny_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("here", "weights"), ("same", "weights"), ("other", "others")):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_text(content)
        Path(name, "lambada_test.jsonl").write_text(json.dumps({"text": f"the last word of {content}"}) + "\n")
    both = {"eval_tasks": ["lambada"], "eval_data_dir": "here", "init_from": "here"}
    for plan in nodes.plan(tiny_recipe(**both), tiny_recipe(**{**both, **difference})):
        if message is None:
            assert plan.result().run.total_steps == 12
        else:
            assert_fails(plan, NO_MATCH + message)


def test_values_of_another_version_are_reported_as_missing(nodes: TwoNodes) -> None:
    values = ({"step": 1}, {"step": 1, "a new key": 2})
    with ThreadPoolExecutor(2) as threads:
        checks = [
            threads.submit(check_nodes_match, values[rank], Ranks(nodes.gather_object(rank))) for rank in range(2)
        ]
    for check in checks:
        with pytest.raises(InputError, match=r"a new key is missing on rank 0, 2 on rank 1; .* the same code"):
            check.result()


def test_code_with_any_other_content_is_another_version(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name / "training" / "data").mkdir(parents=True)
        (tmp_path / name / "training" / "data" / "order.py").write_text("SEED = 1")
        (tmp_path / name / f"notes of {name}.py").write_text(name)  # outside of the packages
    assert hash_of_files(tmp_path / "here", *SOURCES) == hash_of_files(tmp_path / "there", *SOURCES)
    (tmp_path / "there" / "training" / "data" / "order.py").write_text("SEED = 2")
    assert hash_of_files(tmp_path / "here", *SOURCES) != hash_of_files(tmp_path / "there", *SOURCES)


def test_node_without_the_checkpoints_is_an_error_and_one_with_a_copy_starts(
    nodes: TwoNodes, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = tiny_recipe(max_steps=4), tiny_recipe(max_steps=4, output_dir=str(tmp_path / "there"))
    with monkeypatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        patch.delenv("LOCAL_WORLD_SIZE")
        train(run)
    here, elsewhere = (dataclasses.replace(recipe, max_steps=8) for recipe in (run, there))
    for plan in nodes.plan(here, elsewhere):
        assert_fails(plan, NO_MATCH + "first step is 4 on rank 0, 0 on rank 1; checkpoint is [0-9a-f]+ on .* copy both")
    shutil.copytree(run.output_dir, there.output_dir)
    assert [plan.result().run.first_step for plan in nodes.plan(here, elsewhere)] == [4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_dir": "absent", "corpus": "absent.txt"}, "absent.txt"),
        ({"val_tokens": 3_000}, "val_tokens 2000 instead of 3000"),
        ({"eval_tasks": ["lambada"], "eval_data_dir": "absent"}, "absent"),
    ],
)
def test_error_of_one_node_ends_the_other_immediately(
    change: dict[str, object], message: str, nodes: TwoNodes, tiny_recipe: Make
) -> None:
    started = time.monotonic()
    right, wrong = nodes.plan(tiny_recipe(), tiny_recipe(**change))
    assert_fails(wrong, message)
    assert_fails(right, "^rank 1 failed: ")
    assert time.monotonic() - started < 20


def test_node_whose_producer_fails_after_the_first_shards_starts_with_the_others(
    nodes: TwoNodes, tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    folders = [GrowingFolder(shard_folder, tmp_path / f"data-{number}") for number in range(2)]
    folders[0].show(2)
    folders[1].show(1)
    changed = tmp_path / "corpus.jsonl"
    changed.write_text('{"text": "not the corpus of the folder"}\n')
    lines: list[str] = []
    nodes.producers[0].report = lines.append
    with locked(folders[1].path):  # the other node's producer waits
        plans = nodes.plan(
            tiny_recipe(data_dir=str(folders[0].path), corpus=str(changed)),
            tiny_recipe(data_dir=str(folders[1].path)),
        )
        deadline = time.monotonic() + 30
        while not nodes.producers[0].failure and time.monotonic() < deadline:
            time.sleep(0.05)
        assert nodes.producers[0].failure
        time.sleep(1)
        assert not any(plan.done() for plan in plans)
        restore(folders[1], shard_folder, len(folders[1].complete_manifest.shards))
        assert [len(ShardFolder.open(plan.result().run.shards.folder.path).train_shards) for plan in plans] == [
            1,
            len(folders[1].complete_manifest.shards) - 1,
        ]
    deadline = time.monotonic() + 10
    while not any("failed" in line for line in lines) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any("has changed since" in line and "training ends after the shards" in line for line in lines)


def test_error_of_a_producer_is_shared_in_the_next_gather(nodes: TwoNodes) -> None:
    class Failing(BackgroundProducer):
        def fail(self) -> None:
            self.failure = "a failure"

    producer, gathered = Failing(), []

    def gather_object(values: list[Any]) -> list[Any]:
        gathered.extend(values)
        producer.fail()
        return values

    ranks = Ranks(gather_object)
    with pytest.raises(InputError, match=r"^a failure$"), ranks.share_errors():
        wait_for_shards(lambda: False, producer, ranks)
    assert len(gathered) == 2
    assert gathered[0] is False
