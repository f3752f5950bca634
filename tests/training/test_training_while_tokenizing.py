"""Complete runs that train while the producer works: the same batches, waits, failures and restarts."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.background import processes_that_name, slow_corpus, wait_until
from support.growing_folder import GrowingFolder, restore
from support.paths import ROOT
from support.small_corpora import make_shards

from common.cli_errors import InputError
from common.folder_lock import locked
from training.checkpoints.checkpoint_folder import TrainerState, checkpoints
from training.data.loading.loader import TrainingShards
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.tokenization.tokenizer import train_bpe
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.monitoring.run_log import RunLog
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture
def growing(shard_folder: Path, tmp_path: Path) -> GrowingFolder:
    return GrowingFolder(shard_folder, tmp_path / "growing")


def test_run_without_shards_equals_run_over_complete_shards(tiny_recipe: Make, tmp_path: Path) -> None:
    ready = tiny_recipe(output_dir=str(tmp_path / "ready"))
    train(ready)
    background = tiny_recipe(output_dir=str(tmp_path / "background"), data_dir=str(tmp_path / "data"))
    train(background)
    assert [line["train_loss"] for line in read_metrics(Path(background.output_dir)) if "train_loss" in line] == [
        line["train_loss"] for line in read_metrics(Path(ready.output_dir)) if "train_loss" in line
    ]
    assert not any(thread.name == "producer" for thread in threading.enumerate())


def test_run_without_further_shards_logs_that_it_waits_and_continues(
    tiny_recipe: Make, growing: GrowingFolder, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another node holds the lock: training uses the shards it has, waits, and continues with the rest."""
    growing.show(2)
    recipe = tiny_recipe(data_dir=str(growing.path), max_steps=60, save_steps=20, eval_steps=0, sample_steps=0)
    ready = tiny_recipe(output_dir=str(tmp_path / "ready"), max_steps=60, save_steps=0, eval_steps=0, sample_steps=0)
    available_steps = TrainingShards(ShardFolder.open(growing.path), seq_len=32, seed=0).order.windows_in_epoch(0) // 8
    assert available_steps < 60
    seen: list[int] = []

    def another_node() -> None:
        wait_until(lambda: len(read_metrics(Path(recipe.output_dir))) >= available_steps)
        time.sleep(0.7)
        seen.append(len(read_metrics(Path(recipe.output_dir))))
        restore(growing, shard_folder, len(growing.complete_manifest.shards))

    with locked(growing.path):
        thread = threading.Thread(target=another_node)
        thread.start()
        train(recipe)
        thread.join()
    assert seen == [available_steps]
    line = f"step {available_steps + 1} waits for the corpus: 1 training shards are ready; the next is not ready yet\n"
    assert line in capsys.readouterr().out
    state = TrainerState.read(checkpoints(Path(recipe.output_dir))[0])
    assert len(state.shards) in (2, len(growing.complete_manifest.shards))
    train(ready)
    assert [line["train_loss"] for line in read_metrics(Path(recipe.output_dir)) if "train_loss" in line] == [
        line["train_loss"] for line in read_metrics(Path(ready.output_dir)) if "train_loss" in line
    ]


@pytest.mark.parametrize("shards", [3, 2], ids=["complete", "partial"])
def test_folder_prepared_with_max_tokens_can_be_trained_on(
    shards: int, tiny_recipe: Make, text_file: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(data_dir=str(tmp_path / "complete"), max_steps=3, eval_steps=0, sample_steps=0, save_steps=0)
    sizes = {"shard_tokens": 9_000, "val_tokens": 2_000, "max_tokens": 12_000}
    make_shards(tmp_path / "complete", corpus=str(text_file), tokenizer=recipe.tokenizer, **sizes)
    folder = GrowingFolder(tmp_path / "complete", tmp_path / "data")
    steps = 2 if folder.show(shards, complete=shards == 3).complete else 40  # the first shard has 35
    train(dataclasses.replace(recipe, data_dir=str(folder.path), max_steps=steps))
    manifest = Manifest.read(folder.path)
    assert manifest == folder.complete_manifest


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_producer_that_a_restart_cannot_resolve_ends_the_run_saved(
    workers: int, tiny_recipe: Make, growing: GrowingFolder, shard_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    growing.show(2)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a corpus that the folder was not made from"}\n')
    recipe = tiny_recipe(data_dir=str(growing.path), corpus=str(corpus), max_steps=40, dataloader_num_workers=workers)
    recipe = dataclasses.replace(recipe, eval_steps=0, sample_steps=0, save_steps=0)
    with pytest.raises(InputError, match=r"the shards end before step 36, and the run is saved: the corpus '.*changed"):
        train(recipe)
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["step-000035"]
    restore(growing, shard_folder, len(growing.complete_manifest.shards))
    shutil.copy(text_file, corpus)
    train(recipe)
    assert [line["step"] for line in read_metrics(Path(recipe.output_dir)) if "train_loss" in line] == list(
        range(1, 41)
    )


def test_producer_stops_before_the_run_log_is_closed(
    tiny_recipe: Make, growing: GrowingFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.show(2)
    alive = {}

    def noting(method: Callable[..., None], when: str) -> Callable[..., None]:
        def noted(log: RunLog) -> None:
            alive[when] = "producer" in [thread.name for thread in threading.enumerate()]
            method(log)

        return noted

    monkeypatch.setattr(RunLog, "advance", noting(RunLog.advance, "in a step"))
    monkeypatch.setattr(RunLog, "close", noting(RunLog.close, "at the end"))
    with locked(growing.path):  # the producer waits
        train(tiny_recipe(data_dir=str(growing.path), max_steps=2, eval_steps=0))
    assert alive == {"in a step": True, "at the end": False}


def test_length_in_epochs_waits_for_the_complete_folder(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(data_dir=str(tmp_path / "data"), max_steps=None, num_train_epochs=0.1, eval_steps=0)
    train(recipe)
    folder = ShardFolder.open(tmp_path / "data")
    assert folder.complete
    steps = len([line for line in read_metrics(Path(recipe.output_dir)) if "train_loss" in line])
    windows = TrainingShards(folder, seq_len=32, seed=0).order.windows_in_epoch(0)
    assert steps == int(0.1 * windows) * 32 // 256


def test_unreadable_corpus_aborts_the_run_with_the_error_of_the_producer(tiny_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"texts": "no such field"}\n')
    recipe = tiny_recipe(data_dir=str(tmp_path / "data"), corpus=str(tmp_path / "c.jsonl"), tokenizer="train:300")
    with pytest.raises(InputError, match=r"^no field 'text' in .*did you mean texts"):
        train(recipe)
    assert not Path(recipe.output_dir).exists()
    assert not (tmp_path / "data").exists()


@on_linux
def test_producer_killed_during_a_run_is_restarted_and_the_run_continues(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_bpe(["token window shard batch"] * 9, 260).save(tmp_path / "tokenizer")
    data = tmp_path / "data"
    recipe = tiny_recipe(
        data_dir=str(data),
        corpus=str(slow_corpus(tmp_path / "c.jsonl")),
        tokenizer=str(tmp_path / "tokenizer"),
        shard_tokens=20_000,
        max_steps=250,  # through three shards
        eval_steps=0,
        sample_steps=0,
        save_steps=0,
        preprocessing_num_workers=0,
    )
    at_the_kill: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(read_metrics(Path(recipe.output_dir))) > 3)
        for process in processes_that_name(str(data)):
            os.kill(process, signal.SIGKILL)
        manifest = Manifest.read(data)
        assert manifest is not None
        at_the_kill.append(len(manifest.shards))

    thread = threading.Thread(target=kill)
    thread.start()
    train(recipe)
    thread.join()
    assert at_the_kill
    assert "The shard producer failed: killed by SIGKILL; training continues" in capsys.readouterr().out
    losses = [line["train_loss"] for line in read_metrics(Path(recipe.output_dir)) if "train_loss" in line]
    assert len(losses) == 250
    assert processes_that_name(str(data)) == []


@on_linux
@pytest.mark.slow
def test_two_processes_of_a_node_start_one_producer(programs: Path, tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(output_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "data"), max_steps=3, eval_steps=0)
    recipe.save(tmp_path / "recipe.yaml")
    command = [str(programs / "accelerate"), "launch", "--quiet", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    command += [str(ROOT / "training" / "train.py"), "--config", str(tmp_path / "recipe.yaml")]
    producers: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for found in processes_that_name(str(tmp_path / "data")):
                try:
                    if b"background_producer" in Path(f"/proc/{found}/cmdline").read_bytes():
                        # Between fork and exec, a process looks like its parent.
                        producers.add(os.getsid(found))
                except (FileNotFoundError, ProcessLookupError):
                    continue
            time.sleep(0.05)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    assert len(producers) == 1
    alone = dataclasses.replace(recipe, output_dir=str(tmp_path / "alone"))
    train(alone)
    for path in (recipe, alone):
        assert len(read_metrics(Path(path.output_dir))) == 4
    for two, one in zip(read_metrics(tmp_path / "run"), read_metrics(tmp_path / "alone"), strict=True):
        key = "train_loss" if "train_loss" in one else "val_loss"
        assert two[key] == pytest.approx(one[key], abs=1e-5)
