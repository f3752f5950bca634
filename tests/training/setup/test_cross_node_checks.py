"""What machines tell each other before a run begins; threads stand for them here."""

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
from training.data.producing.background_producer import ProducerBeside
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.loop import train
from training.recipe import Recipe
from training.setup.cross_node_checks import Machines
from training.setup.plan import Plan, plan_run

Make = Callable[..., Recipe]

GIVEN_UP = "^another process of the run met a mistake and the run cannot begin"


class TwoMachines:
    """Plans of one run, made at the same time; a machine that asks the other, when that is gone, fails."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._meeting = threading.Barrier(2, timeout=30)
        self._threads = ThreadPoolExecutor(2)
        self.producers = [ProducerBeside(lambda line: None) for _ in range(2)]

    def least(self, number: int) -> int:
        self._numbers.append(number)
        self._meeting.wait()
        smallest = min(self._numbers)
        if self._meeting.wait() == 0:
            self._numbers.clear()
        self._meeting.wait()
        return smallest

    def plan(self, *recipes: Recipe) -> list[Future[Plan]]:
        return [
            self._threads.submit(plan_run, recipe, producer, least=self.least)
            for recipe, producer in zip(recipes, self.producers, strict=True)
        ]

    def end(self) -> None:
        for producer in self.producers:
            producer.stop()
        self._threads.shutdown()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMachines]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    # numpy parses a header as Python, which Python 3.11 cannot do in two threads at once; machines have one each.
    parse, one_at_a_time = token_files._npy_header, threading.Lock()

    def parse_alone(*arguments: Any) -> Any:
        with one_at_a_time:
            return parse(*arguments)

    monkeypatch.setattr(token_files, "_npy_header", parse_alone)
    machines = TwoMachines()
    yield machines
    machines.end()


def folder_with_another_shard(shard_folder: Path, path: Path) -> Path:
    """A copy that is right by itself, of which the first training shard is another."""
    shutil.copytree(shard_folder, path)
    manifest = Manifest.read(path)
    assert manifest is not None
    shards = list(manifest.shards)
    file = path / shards[1].file
    np.save(file, np.load(file)[::-1])
    shards[1] = dataclasses.replace(shards[1], sha256=file_sha256(file))
    dataclasses.replace(manifest, shards=tuple(shards)).write(path)
    return path


def refuse(plan: Future[Plan], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        plan.result()
    assert "\n" not in str(caught.value)


def test_machines_with_the_same_data_begin(
    machines: TwoMachines, tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(shard_folder, tmp_path / "copy")
    plans = machines.plan(tiny_recipe(), tiny_recipe(data_dir=str(tmp_path / "copy")))
    assert [plan.result().total_steps for plan in plans] == [12, 12]


def test_machines_with_other_shards_are_all_refused(
    machines: TwoMachines, tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    other = folder_with_another_shard(shard_folder, tmp_path / "other")
    for plan in machines.plan(tiny_recipe(), tiny_recipe(data_dir=str(other))):
        refuse(plan, "^expected the same data on every machine, found different ones .* first training shard .* copy")


def test_machines_with_tokenizers_trained_on_each_are_all_refused(
    machines: TwoMachines, tiny_recipe: Make, tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "quite another text than theirs"}\n' * 3000)
    theirs = {"corpus": str(tmp_path / "c.jsonl"), "tokenizer": "train:275", "data_dir": str(tmp_path / "data")}
    ours = {"tokenizer": "train:275", "data_dir": str(tmp_path / "ours")}
    for plan in machines.plan(tiny_recipe(**ours), tiny_recipe(**theirs)):
        refuse(plan, "^expected the same data on every machine")


def test_ready_shards_without_a_manifest_are_compared_by_their_ids(
    machines: TwoMachines, tiny_recipe: Make, tmp_path: Path
) -> None:
    recipes = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, size in (("x_val_000000", 500), ("x_train_000001", 3000)):
            np.save(folder / f"{name}.npy", np.full(size, number, dtype="<u2"))
        recipes.append(tiny_recipe(data_dir=str(folder), tokenizer=tiny_recipe().data_dir))
    for plan in machines.plan(*recipes):
        refuse(plan, "^expected the same data on every machine")


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ({"learning_rate": 1e-4}, "learning_rate 0.00"),
        ({"max_steps": 13}, "steps in all 1[23], max_steps 1[23]"),
        ({"init_from": "other"}, "initial weights [0-9a-f]*"),
        ({"eval_data_dir": "other"}, "items of eval_tasks [0-9a-f]*"),
        ({"init_from": "same", "eval_data_dir": "same", "report_to": ["tensorboard"]}, None),
    ],
)
def test_machines_with_other_recipes_are_all_refused(
    difference: dict[str, object],
    told: str | None,
    machines: TwoMachines,
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
    for plan in machines.plan(tiny_recipe(**both), tiny_recipe(**{**both, **difference})):
        if told is None:
            assert plan.result().total_steps == 12
        else:
            refuse(plan, rf"^expected the same run on every machine, found different ones \(in .* here: {told}\d*\);")


def test_machines_with_other_versions_of_the_project_do_not_begin(machines: TwoMachines) -> None:
    facts = ({"step": 1}, {"step": 1, "a new key": 2})
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(Machines(machines.least).compare_runs, "run", lambda f=f: f) for f in facts]
    for answer in asked:
        with pytest.raises(InputError, match=r"^expected the same version of this project on every machine"):
            answer.result()


def test_machine_without_the_others_checkpoints_is_refused_and_one_with_a_copy_begins(
    machines: TwoMachines, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, there = tiny_recipe(max_steps=4), tiny_recipe(max_steps=4, output_dir=str(tmp_path / "there"))
    with monkeypatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        patch.delenv("LOCAL_WORLD_SIZE")
        train(run)
    here, elsewhere = (dataclasses.replace(recipe, max_steps=8) for recipe in (run, there))
    plans, found = machines.plan(here, elsewhere), ("4, checkpoint [0-9a-f]+", "0, checkpoint None")
    for plan, taken in zip(plans, found, strict=True):
        refuse(plan, f"^expected the same run .* here: steps taken {taken}.*\\); .* a copy of all")
    shutil.copytree(run.output_dir, there.output_dir)
    assert [plan.result().first_step for plan in machines.plan(here, elsewhere)] == [4, 4]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"data_dir": "absent", "corpus": "absent.txt"}, "absent.txt"),
        ({"val_tokens": 3_000}, "val_tokens 2000 instead of 3000"),
        ({"eval_tasks": ["lambada"], "eval_data_dir": "absent"}, "absent"),
    ],
)
def test_mistake_of_one_machine_ends_the_other_at_once(
    mistake: dict[str, object], message: str, machines: TwoMachines, tiny_recipe: Make
) -> None:
    started = time.monotonic()
    right, wrong = machines.plan(tiny_recipe(), tiny_recipe(**mistake))
    refuse(wrong, message)
    refuse(right, GIVEN_UP)
    assert time.monotonic() - started < 20


def test_machine_whose_producer_fails_behind_its_first_shards_begins_with_the_others(
    machines: TwoMachines, tiny_recipe: Make, shard_folder: Path, tmp_path: Path
) -> None:
    folders = [GrowingFolder(shard_folder, tmp_path / f"data-{number}") for number in range(2)]
    folders[0].show(2)
    folders[1].show(1)
    changed = tmp_path / "corpus.jsonl"
    changed.write_text('{"text": "what the folder was not begun with"}\n')
    lines: list[str] = []
    machines.producers[0].say = lines.append
    with locked(folders[1].path):  # the other node's producer waits
        plans = machines.plan(
            tiny_recipe(data_dir=str(folders[0].path), corpus=str(changed)),
            tiny_recipe(data_dir=str(folders[1].path)),
        )
        deadline = time.monotonic() + 30
        while not machines.producers[0].hopeless and time.monotonic() < deadline:
            time.sleep(0.05)
        assert machines.producers[0].hopeless
        time.sleep(1)
        assert not any(plan.done() for plan in plans)
        restore(folders[1], shard_folder, len(folders[1].whole.shards))
        assert [len(ShardFolder.open(plan.result().folder.path).train_shards) for plan in plans] == [
            1,
            len(folders[1].whole.shards) - 1,
        ]
    deadline = time.monotonic() + 10
    while not any("died" in line for line in lines) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert any("has changed since" in line and "training goes on with the shards there are" in line for line in lines)


def test_producer_that_fails_while_machines_talk_is_told_in_the_next_exchange(machines: TwoMachines) -> None:
    class Failing(ProducerBeside):
        def fail(self) -> None:
            self._hopeless = "a broken line"

    producer, told = Failing(), []

    def least(number: int) -> int:
        told.append(number)
        producer.fail()
        return number

    with pytest.raises(InputError, match=r"^a broken line$"):
        Machines(least).wait_for(lambda: False, producer)
    assert len(told) == 2
    assert told[1] < told[0]


def test_machines_that_do_not_meet_hear_of_the_mistake_of_their_own(machines: TwoMachines) -> None:
    def least(number: int) -> int:
        raise InputError("process 0 of 2 did not meet the others")

    with pytest.raises(InputError, match=r"^ours$"), Machines(least).told_of_mistakes():
        raise InputError("ours")
