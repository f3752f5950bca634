"""Nodes with separate shard folders; processes with a short timeout stand in for them."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.growing_folder import GrowingFolder, restore
from support.processes import ProcessesOfARun

from common.folder_lock import locked
from training.data.shards.manifest import Manifest
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]

TIMEOUT_SECONDS = 6.0


@pytest.fixture
def start(tiny_recipe: Make, shard_folder: Path, tmp_path: Path) -> Callable[..., tuple[ProcessesOfARun, list[Recipe]]]:
    """Start two nodes: the first has all shards, the second the given folder and changes."""

    def start(data_dir: Path, **changes: object) -> tuple[ProcessesOfARun, list[Recipe]]:
        shutil.copytree(shard_folder, tmp_path / "data-0")
        both = {"eval_steps": 0, "sample_steps": 0, "save_steps": 0, "max_steps": 3}
        recipes = [
            tiny_recipe(output_dir=str(tmp_path / "run-0"), data_dir=str(tmp_path / "data-0"), **both),
            tiny_recipe(output_dir=str(tmp_path / "run-1"), data_dir=str(data_dir), **both, **changes),
        ]
        paths = [tmp_path / f"{number}.yaml" for number in range(2)]
        for recipe, path in zip(recipes, paths, strict=True):
            recipe.save(path)
        return ProcessesOfARun(paths, 2, tmp_path / "printed", timeout_seconds=TIMEOUT_SECONDS), recipes

    return start


def test_node_that_waits_long_for_its_first_shards_does_not_end_the_others(
    start: Callable[..., tuple[ProcessesOfARun, list[Recipe]]], shard_folder: Path, tmp_path: Path
) -> None:
    growing = GrowingFolder(shard_folder, tmp_path / "data-1")
    growing.show(1)
    with locked(growing.path):  # the node's own producer waits
        processes, recipes = start(growing.path)
        time.sleep(1.5 * TIMEOUT_SECONDS)
        assert all(process.is_alive() for process in processes.processes), processes.printed.read_text()
        restore(growing, shard_folder, len(growing.complete_manifest.shards))
        assert processes.wait() == [0, 0], processes.printed.read_text()
    assert len([line for line in read_metrics(Path(recipes[0].output_dir)) if "train_loss" in line]) == 3


def test_unreadable_corpus_of_one_node_ends_all_with_one_line_each(
    start: Callable[..., tuple[ProcessesOfARun, list[Recipe]]], tmp_path: Path
) -> None:
    (tmp_path / "c.jsonl").write_text('{"texts": "no such field"}\n')
    processes, _ = start(tmp_path / "data-1", corpus=str(tmp_path / "c.jsonl"))
    assert processes.wait() == [2, 2]
    errors = sorted(line for line in processes.printed.read_text().splitlines() if line.startswith("error: "))
    assert len(errors) == 2
    assert errors[1].startswith("error: rank 1 failed: ")
    assert "'text' in" in errors[0]
    assert errors[0].removeprefix("error: ") in errors[1]
    assert "Traceback" not in processes.printed.read_text()


def test_nodes_with_different_data_do_not_train_together(
    start: Callable[..., tuple[ProcessesOfARun, list[Recipe]]], shard_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data-1"
    shutil.copytree(shard_folder, data)
    manifest = Manifest.read(data)
    assert manifest is not None
    dataclasses.replace(manifest, corpus_revision="another").write(data)
    processes, recipes = start(data)
    assert processes.wait() == [2, 2], processes.printed.read_text()
    lines = processes.printed.read_text()
    assert lines.count(f"{data} was made of other content") == 2
    assert "Traceback" not in lines
    assert not any(Path(recipe.output_dir).exists() for recipe in recipes)
