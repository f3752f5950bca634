"""The process of the background producer: failures, restarts, and what it leaves when it stops."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.background import processes_that_name, slow_corpus, wait_until
from support.paths import ROOT

from common.cli_errors import TemporaryError
from common.folder_lock import LOCK_NAME, locked
from training.data.producing.background_producer import BackgroundProducer, _produce, producer_command
from training.data.producing.producer import produce
from training.data.shards.manifest import Manifest
from training.data.shards.shard_spec import ShardSpec
from training.data.tokenization.tokenizer import train_bpe
from training.recipe import Recipe
from training.setup.training_data import preprocessing_workers

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    # On busy cores, several threads slow tiny matrices down.
    monkeypatch.setattr("training.setup.accelerator.use_all_cores", lambda: torch.set_num_threads(1))


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


def test_user_error_while_training_is_not_retried(tmp_path: Path) -> None:
    lines: list[str] = []
    with BackgroundProducer(lines.append) as producer:
        producer.training_started()
        producer.start(script(tmp_path, "print('error: the corpus has changed', file=sys.stderr); sys.exit(2)"))
        wait_until(lambda: producer.failure == "the corpus has changed")
        wait_until(lambda: lines)
    assert lines == [
        "The shard producer failed: the corpus has changed; training ends after the shards that are complete"
    ]


def test_temporary_error_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise TemporaryError("cannot write: the disk is full")

    monkeypatch.setattr("training.data.producing.producer.produce", full)
    monkeypatch.setattr(
        sys, "argv", ["", ShardSpec(folder=tmp_path, corpus="c", shard_tokens=2, val_tokens=1).to_json(), "0"]
    )
    monkeypatch.setattr("os.nice", lambda _: None)
    monkeypatch.setattr("training.data.producing.background_producer._exit_with_parent", lambda: None)
    monkeypatch.setattr("training.data.producing.background_producer.interrupt_on_sigterm", lambda: None)
    with pytest.raises(SystemExit, match="75"):
        _produce()


def test_producer_that_crashed_just_before_training_is_logged_and_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.data.producing.background_producer._ATTEMPTS_BEFORE_TRAINING", 1)
    marker = tmp_path / "tries"
    code = f"marker = pathlib.Path({str(marker)!r}); tries = marker.exists(); marker.touch()\n"
    lines: list[str] = []
    with BackgroundProducer(lines.append) as producer:
        producer.start(
            script(tmp_path, code + "if not tries: sys.exit(print('error: bad', file=sys.stderr) or 1)\nprint('well')")
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


def test_second_producer_waits_for_the_first_and_finds_the_folder_complete(
    tmp_path: Path, text_file: Path, shard_folder: Path
) -> None:
    spec = ShardSpec(
        folder=tmp_path / "out", corpus=str(text_file), tokenizer="train:300", shard_tokens=9_000, val_tokens=2_000
    )
    lines: list[str] = []
    with ThreadPoolExecutor(1) as second:
        with locked(spec.folder):  # by the first producer
            waiting = second.submit(produce, spec, num_workers=0, wait=True, report=lines.append)
            wait_until(lambda: lines)
            shutil.copytree(shard_folder, spec.folder, dirs_exist_ok=True)
            written = {path: path.stat().st_ino for path in spec.folder.glob("*.npy")}
        assert waiting.result().complete
    waited, summary = lines
    assert "another process is filling" in waited
    assert "11 shards" in summary
    assert written == {path: path.stat().st_ino for path in spec.folder.glob("*.npy")}


def test_producer_gets_the_cores_that_training_leaves_free(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.setup.training_data.usable_cpus", lambda: 64)
    assert preprocessing_workers(tiny_recipe(dataloader_num_workers=2), 8) == 64 - 24
    assert preprocessing_workers(tiny_recipe(preprocessing_num_workers=3), 8) == 3
    monkeypatch.setattr("training.setup.training_data.usable_cpus", lambda: 2)
    assert preprocessing_workers(tiny_recipe(), 8) == 2
    monkeypatch.setattr("training.setup.training_data.usable_cpus", lambda: 1)
    assert preprocessing_workers(tiny_recipe(), 8) == 1
