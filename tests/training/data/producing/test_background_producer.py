"""Training while the producer runs in the background: start, failures, restarts, and what is left at the end."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.growing_folder import GrowingFolder, restore
from support.paths import ROOT
from support.small_corpora import make_shards

from common.cli_errors import InputError
from common.folder_lock import LOCK_NAME, locked
from training.checkpoints.checkpoint_folder import TrainerState, checkpoints
from training.data.loading.training_shards import TrainingShards
from training.data.producing.background_producer import BackgroundProducer, producer_command
from training.data.producing.producer import produce
from training.data.shards.manifest import Manifest
from training.data.shards.shard_reader import ShardFolder
from training.data.shards.shard_spec import ShardSpec
from training.data.tokenization.tokenizer import train_bpe
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.monitoring.run_log import RunLog
from training.recipe import Recipe
from training.setup.training_data import preprocessing_workers

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # On busy cores, several threads slow tiny matrices down.
    monkeypatch.setattr("training.setup.accelerator.use_all_cores", lambda: torch.set_num_threads(1))


def processes_that_name(text: str) -> list[int]:
    """Processes other than this one whose command line contains `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text.encode() in command and state[0] != "Z" and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def growing(shard_folder: Path, tmp_path: Path) -> GrowingFolder:
    return GrowingFolder(shard_folder, tmp_path / "growing")


# The child process


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "stand_in.py"
    path.write_text("import os, pathlib, sys, time\n" + text)
    return [sys.executable, str(path)]


def test_dying_producer_is_logged_with_its_error_and_restarted(tmp_path: Path) -> None:
    command = script(
        tmp_path,
        f"""
marker = pathlib.Path({str(tmp_path / "tries")!r})
tries = len(marker.read_text()) if marker.exists() else 0
marker.write_text("x" * (tries + 1))
if tries < 2:
    print("Traceback (most recent call last):", file=sys.stderr)
    sys.exit("error: the disk is full")
""",
    )
    lines: list[str] = []
    with BackgroundProducer(lines.append) as producer:
        producer.training_started()
        producer.start(command)
        wait_until(lambda: (tmp_path / "tries").exists() and len((tmp_path / "tries").read_text()) == 3)
        assert producer.failure is None
    assert lines == [
        f"The shard producer failed: the disk is full; training continues with the shards that are complete; "
        f"restarting it in {seconds} s"
        for seconds in (1, 2)
    ]


def test_user_error_before_the_first_shard_ends_the_wait(tmp_path: Path) -> None:
    lines: list[str] = []
    with BackgroundProducer(lines.append) as producer:
        producer.start(script(tmp_path, "print('error: no such corpus', file=sys.stderr); sys.exit(2)"))
        wait_until(lambda: producer.failure == "no such corpus")
    assert lines == []


def test_producer_that_failed_just_before_training_is_logged_and_restarted(tmp_path: Path) -> None:
    marker = tmp_path / "tries"
    code = f"marker = pathlib.Path({str(marker)!r}); tries = marker.exists(); marker.touch()\n"
    lines: list[str] = []
    with BackgroundProducer(lines.append) as producer:
        producer.start(
            script(tmp_path, code + "if not tries: sys.exit(print('error: bad', file=sys.stderr) or 2)\nprint('well')")
        )
        wait_until(lambda: producer.failure)
        producer.training_started()
        wait_until(lambda: len(lines) == 2)
    failed = (
        "The shard producer failed: bad; training continues with the shards that are complete; restarting it in 1 s"
    )
    assert lines == [failed, "well"]


def test_killed_producer_is_restarted_and_its_signal_logged(tmp_path: Path) -> None:
    lines: list[str] = []
    with BackgroundProducer(lines.append) as producer:
        producer.training_started()
        producer.start(script(tmp_path, "print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"))
        wait_until(lambda: lines)
    assert "failed: killed by SIGKILL; training continues" in lines[0]


def test_producer_logs_one_line_a_minute_during_training(tmp_path: Path) -> None:
    lines: list[str] = []
    marker = tmp_path / "done"
    with BackgroundProducer(lines.append) as producer:
        producer.training_started()
        producer.start(script(tmp_path, f"print('first'); print('second'); pathlib.Path({str(marker)!r}).touch()"))
        wait_until(marker.exists)
    assert lines == ["first"]


def test_producer_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.producing.background_producer._SECONDS_TO_EXIT", 0.5)
    marker = tmp_path / "started"
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path({str(marker)!r}).touch()"
    with BackgroundProducer() as producer:
        producer.start(script(tmp_path, code + "; time.sleep(60)"))
        wait_until(marker.exists)
    assert threading.active_count() == 1 or not any(thread.name == "producer" for thread in threading.enumerate())


def slow_corpus(path: Path) -> Path:
    """A corpus that keeps the producer busy for some seconds."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("to", "ken", "win", "shard", "ba") for b in ("s", "dow", "ch", "ing", "er")]
    with path.open("w") as file:
        for _ in range(20_000):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=200))}) + "\n")
    return path


@pytest.fixture
def slow_command(tmp_path: Path) -> list[str]:
    train_bpe(["token window shard batch"] * 9, 260).save(tmp_path / "tokenizer")
    corpus = slow_corpus(tmp_path / "c.jsonl")
    spec = ShardSpec(
        folder=tmp_path / "out",
        corpus=str(corpus),
        tokenizer=str(tmp_path / "tokenizer"),
        shard_tokens=50_000,
        val_tokens=5_000,
    )
    return producer_command(spec, num_workers=1)


@on_linux
def test_producer_stops_with_training_and_leaves_complete_shards_only(tmp_path: Path, slow_command: list[str]) -> None:
    with BackgroundProducer(lambda line: None) as producer:
        producer.start(slow_command)
        wait_until(lambda: (manifest := Manifest.read(tmp_path / "out")) and len(manifest.shards) > 1)
    assert processes_that_name(str(tmp_path)) == []
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert not manifest.complete
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"manifest.json", "tokenizer.json", "tokenizer_config.json", *(s.file for s in manifest.shards)}


@on_linux
def test_producer_stops_when_training_is_killed(tmp_path: Path, slow_command: list[str]) -> None:
    program = f"""
import sys, time
from training.data.producing.background_producer import BackgroundProducer
with BackgroundProducer() as producer:
    producer.start({slow_command!r})
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: (manifest := Manifest.read(tmp_path / "out")) and manifest.shards)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not processes_that_name(str(tmp_path / "out")), 20)
    assert not (tmp_path / "out" / LOCK_NAME).exists()  # the producer had time to clean up


def test_second_producer_waits_for_the_first_and_finds_the_folder_complete(tmp_path: Path, text_file: Path) -> None:
    spec = ShardSpec(
        folder=tmp_path / "out", corpus=str(text_file), tokenizer="train:300", shard_tokens=9_000, val_tokens=2_000
    )
    lines: list[str] = []
    folders: list[ShardFolder] = []
    with BackgroundProducer(lambda line: None) as producer:
        producer.start(producer_command(spec, num_workers=0))
        wait_until((tmp_path / "out" / LOCK_NAME).exists)
        folders.append(produce(spec, num_workers=0, wait=True, report=lines.append))
    assert folders[0].complete
    assert any("another process is filling" in line for line in lines) or len(lines) <= 1


def test_producer_gets_the_cores_that_training_leaves_free(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.setup.training_data.usable_cpus", lambda: 64)
    assert preprocessing_workers(tiny_recipe(dataloader_num_workers=2), 8) == 64 - 24
    assert preprocessing_workers(tiny_recipe(preprocessing_num_workers=3), 8) == 3
    monkeypatch.setattr("training.setup.training_data.usable_cpus", lambda: 2)
    assert preprocessing_workers(tiny_recipe(), 8) == 2
    monkeypatch.setattr("training.setup.training_data.usable_cpus", lambda: 1)
    assert preprocessing_workers(tiny_recipe(), 8) == 1


# Complete runs


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


def test_waiting_run_logs_why_the_producer_failed(
    tiny_recipe: Make, growing: GrowingFolder, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growing.show(2)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a corpus that the folder was not made from"}\n')
    recipe = tiny_recipe(data_dir=str(growing.path), corpus=str(tmp_path / "corpus.jsonl"), max_steps=40)
    recipe = dataclasses.replace(recipe, eval_steps=0, sample_steps=0, save_steps=0)
    log = Path(recipe.output_dir) / "train.log"

    def complete_folder() -> None:
        wait_until(lambda: log.exists() and "waits for the corpus" in log.read_text())
        restore(growing, shard_folder, len(growing.complete_manifest.shards))

    thread = threading.Thread(target=complete_folder)
    thread.start()
    train(recipe)
    thread.join()
    waiting = next(line for line in capsys.readouterr().out.splitlines() if "waits for the corpus" in line)
    assert "the next is not ready yet; the producer failed: the corpus " in waiting


def test_producer_stops_before_the_run_log_is_closed(
    tiny_recipe: Make, growing: GrowingFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growing.show(2)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a corpus that the folder was not made from"}\n')
    alive = {}

    def noting(method: Callable[..., None], when: str) -> Callable[..., None]:
        def noted(log: RunLog) -> None:
            alive[when] = "producer" in [thread.name for thread in threading.enumerate()]
            method(log)

        return noted

    monkeypatch.setattr(RunLog, "advance", noting(RunLog.advance, "in a step"))
    monkeypatch.setattr(RunLog, "close", noting(RunLog.close, "at the end"))
    train(tiny_recipe(data_dir=str(growing.path), corpus=str(tmp_path / "corpus.jsonl"), max_steps=2, eval_steps=0))
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
def test_two_processes_of_a_node_start_one_producer(tiny_recipe: Make, tmp_path: Path) -> None:
    recipe = tiny_recipe(output_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "data"), max_steps=3, eval_steps=0)
    recipe.save(tmp_path / "recipe.yaml")
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--quiet", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    command += [str(ROOT / "training" / "train.py"), "--config", str(tmp_path / "recipe.yaml")]
    producers: set[int] = set()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            for found in processes_that_name(str(tmp_path / "data")):
                try:
                    if b"producer_process" in Path(f"/proc/{found}/cmdline").read_bytes():
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
