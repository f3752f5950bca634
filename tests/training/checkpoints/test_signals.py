"""Stopping on a signal: the step is finished and saved, all ranks stop after the same step, and nothing is lost."""

import dataclasses
import datetime
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.killing import assert_runs_are_equal
from support.paths import ROOT
from support.processes import ProcessesOfARun
from torch import Tensor

from training.checkpoints.checkpoint_folder import checkpoints, step_of
from training.checkpoints.signals import Coordinator, SignalWatch, StopTraining
from training.data.loading.loader import validation_batches
from training.data.shards.shard_reader import Shard
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.monitoring.validation import Validation
from training.recipe import Recipe
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult

Make = Callable[..., Recipe]


class SignalAt(Hook):
    """Sends this process a signal in a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def after_step(self, run: Run, result: StepResult) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(("number", "step"), [(signal.SIGHUP, 5), (signal.SIGINT, 6), (signal.SIGTERM, 12)])
def test_a_signal_saves_and_stops_the_run_and_the_resumed_run_ends_bit_identical(
    number: int,
    step: int,  # 6 is validated, which the next start makes up for; 12 is the last
    tiny_recipe: Make,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    complete = tiny_recipe(output_dir=str(tmp_path / "complete"), dropout=0.1)
    train(complete)
    interrupted = dataclasses.replace(complete, output_dir=str(tmp_path / "interrupted"))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train(interrupted, hooks=[SignalAt(step, number)])
    assert stopped.value.code == 128 + number
    assert {name: signal.getsignal(name) for name in before} == before
    assert checkpoints(tmp_path / "interrupted")[-1].name == f"step-{step:06d}"
    out, err = capfd.readouterr()
    assert f"{signal.Signals(number).name}: finishing this step and saving. Send it again to exit immediately." in err
    assert f"stopped after step {step} of 12; resume from {checkpoints(tmp_path / 'interrupted')[-1]} with" in out
    command = out.splitlines()[-1]
    assert f"training/train.py --config {tmp_path / 'interrupted' / 'recipe.yaml'} --resume_from_checkpoint" in command
    train(interrupted)
    assert_runs_are_equal(tmp_path / "interrupted", tmp_path / "complete")


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("step", [6, 12])  # 12 is the last
def test_a_signal_stops_a_validation_and_the_next_start_makes_up_for_it(
    step: int, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = tiny_recipe(
        output_dir=str(tmp_path / "complete"), dropout=0.1, eval_steps=6, per_device_train_batch_size=4
    )
    train(complete)
    interrupted = dataclasses.replace(complete, output_dir=str(tmp_path / "interrupted"))
    evaluate, read = Validation.evaluate, []

    def batches(shard: Shard, **settings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(validation_batches(shard, **settings)):
            read.append(number)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def with_signal(self: Validation, run: Run) -> None:
        with monkeypatch.context() as patch:
            if run.step == step:
                patch.setattr("training.monitoring.validation.validation_batches", batches)
            evaluate(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "evaluate", with_signal)
        with pytest.raises(SystemExit):
            train(interrupted)
    assert read == [0, 1]
    assert checkpoints(tmp_path / "interrupted")[-1].name == f"step-{step:06d}"
    assert [line["step"] for line in read_metrics(tmp_path / "interrupted") if "val_loss" in line] == list(
        range(6, step, 6)
    )
    train(interrupted)
    assert_runs_are_equal(tmp_path / "interrupted", tmp_path / "complete")
    assert [line["step"] for line in read_metrics(tmp_path / "interrupted") if "val_loss" in line] == [6, 12]
    assert (tmp_path / "interrupted" / "samples.txt").read_text() == (tmp_path / "complete" / "samples.txt").read_text()


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_checkpoint_that_becomes_due_in_a_validation_is_saved_after_it(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(save_steps=0, save_minutes=60.0, eval_steps=6, per_device_train_batch_size=4)
    evaluate = Validation.evaluate

    def an_hour_later(self: Validation, run: Run) -> None:
        if run.step == 6:
            self._coordinator._last_save -= 3600.0
        evaluate(self, run)

    monkeypatch.setattr(Validation, "evaluate", an_hour_later)
    train(recipe)
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["step-000006", "step-000012"]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_signal_stops_a_run_that_waits_for_its_corpus_and_no_step_is_lost(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = tiny_recipe(output_dir=str(tmp_path / "complete"), dropout=0.1)
    train(complete)
    interrupted = dataclasses.replace(complete, output_dir=str(tmp_path / "interrupted"))
    asked = []

    def six_steps_are_ready(accelerator: Accelerator, number: int) -> int:
        asked.append(number)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return min(number, 6 * 8)

    with monkeypatch.context() as patch:
        patch.setattr("training.loop.all_reduce_min", six_steps_are_ready)
        with pytest.raises(SystemExit):
            train(interrupted)
    assert checkpoints(tmp_path / "interrupted")[-1].name == "step-000006"
    train(interrupted)
    assert_runs_are_equal(tmp_path / "interrupted", tmp_path / "complete")


def test_two_processes_stop_after_the_same_step_when_one_gets_a_signal(tiny_recipe: Make, tmp_path: Path) -> None:
    long = tiny_recipe(max_steps=100_000, save_steps=10, sample_steps=0, per_device_train_batch_size=1)
    run = Path(long.output_dir)
    # The second run spends nearly all time in validations, so the signal arrives during one.
    for number, ranks, eval_steps in ((signal.SIGTERM, (1,), 0), (signal.SIGTERM, (1,), 1), (signal.SIGINT, (0, 1), 0)):
        long = dataclasses.replace(long, eval_steps=eval_steps)
        before = step_of(checkpoints(run)[-1]) if checkpoints(run) else 0
        long.save(tmp_path / "r.yaml")
        processes = ProcessesOfARun(tmp_path / "r.yaml", 2, tmp_path / "printed")
        deadline = time.monotonic() + 120
        while not checkpoints(run) or step_of(checkpoints(run)[-1]) == before:
            assert processes.alive, processes.printed.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes.send(number, *ranks)
        assert processes.wait() == [128 + number] * 2
        assert (
            f"stopped after step {step_of(checkpoints(run)[-1]):,} of 100,000; resume from"
            in processes.printed.read_text()
        )


def test_a_single_process_stops_and_saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator(save_minutes=1.0, num_processes=1, timeout=datetime.timedelta(hours=1))
    coordinator.poll()
    assert (coordinator.stop_signal, coordinator.save_is_due) == (0, False)
    coordinator._last_save -= 60.0
    monkeypatch.setattr(SignalWatch, "received", 15)
    for _ in range(2):  # asking changes nothing
        with pytest.raises(StopTraining):
            coordinator.check_stop()
        assert (coordinator.stop_signal, coordinator.save_is_due) == (15, True)
    coordinator.restart_clock()
    coordinator.poll()
    assert not coordinator.save_is_due


def test_a_save_by_the_clock_is_agreed_on_one_poll_later_and_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        def wait(self) -> None:
            pass

    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: "group")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, async_op: Done())
    coordinator = Coordinator(save_minutes=1.0, num_processes=2, timeout=datetime.timedelta(hours=1))
    coordinator._last_save -= 60.0
    due = []
    for _ in range(4):
        coordinator.poll()
        due.append(coordinator.save_is_due)
        if coordinator.save_is_due:
            coordinator.restart_clock()
    assert due == [False, True, False, False]


WATCH = """
import signal, time
from training.checkpoints.signals import SignalWatch
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
with SignalWatch() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGHUP)], ids=str
)
def test_a_second_signal_exits_immediately_but_not_a_launchers_or_shells_echo(
    processes: int, number: int, programs: Path
) -> None:
    environment = {**os.environ, "WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([programs / "python", "-c", WATCH], stdout=subprocess.PIPE, env=environment) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == b"ready\n"
        watching.send_signal(number)
        assert watching.stdout.readline() == b"first\n"
        if processes > 1 or number == signal.SIGHUP:
            watching.send_signal(number)
            with pytest.raises(subprocess.TimeoutExpired):
                watching.wait(1.1)
        watching.send_signal(number)
        assert watching.wait(10) == 128 + number


LEAVE = """
import signal, time
from training.checkpoints.signals import SignalWatch
try:
    with SignalWatch():
        raise SystemExit(143)
finally:
    print("closing", flush=True)
    time.sleep(1)
    print("closed", flush=True)
"""


def test_a_stopping_rank_ignores_the_sigterm_that_the_launcher_sends_when_another_has_exited(
    programs: Path,
) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([programs / "python", "-c", LEAVE], stdout=subprocess.PIPE, env=environment) as leaving:
        assert leaving.stdout is not None
        assert leaving.stdout.readline() == b"closing\n"
        leaving.send_signal(signal.SIGTERM)
        assert leaving.stdout.read() == b"closed\n"
        assert leaving.wait(10) == 143


def test_a_terminal_that_closes_does_not_reach_a_run_under_nohup() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalWatch() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_killed_launcher_counts_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    signals = SignalWatch()
    assert signals.received == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert signals.received == signal.SIGTERM


def test_without_a_launcher_the_parent_may_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    signals = SignalWatch()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert signals.received == 0
