"""Leaving when told to: the step is finished and saved, every process leaves after the same one, nothing is lost."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.killing import assert_end_alike
from support.paths import ROOT
from support.processes import ProcessesOfARun
from torch import Tensor

from training.checkpoints.checkpoint_folder import checkpoints, step_of
from training.checkpoints.checkpoint_writer import Saving
from training.checkpoints.signals import Agreement, SignalWatch
from training.data.loading.loader import validation_batches
from training.data.shards.shard_reader import Shard
from training.loop import Run, train
from training.monitoring.monitor import Watch
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]


def signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in the middle of a step."""
    step_taken, steps = Watch.step_taken, [0]

    def with_signal(self: Watch) -> None:
        steps[0] += 1
        if steps[0] == step:
            os.kill(os.getpid(), number)
        step_taken(self)

    monkeypatch.setattr(Watch, "step_taken", with_signal)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 5), (signal.SIGINT, 6), (signal.SIGTERM, 12)])
def test_a_run_that_is_told_to_leave_saves_and_ends_as_an_unbroken_one(
    number: int,
    step: int,  # 6 is validated, which the next start makes up for; 12 is the last
    tiny_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = tiny_recipe(output_dir=str(tmp_path / "whole"), dropout=0.1)
    train(whole)
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    with monkeypatch.context() as patch:
        signal_at(step, number, patch)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            train(broken)
    assert left.value.code == 128 + number
    assert {name: signal.getsignal(name) for name in before} == before
    assert checkpoints(tmp_path / "broken")[-1].name == f"step-{step:06d}"
    out, err = capfd.readouterr()
    assert f"{signal.Signals(number).name}: the step is finished and saved, then the run stops" in err
    assert f"stopped after step {step} of 12; the run goes on from {checkpoints(tmp_path / 'broken')[-1]} with" in out
    command = out.splitlines()[-1]
    assert (
        f"launch training/train.py --config {tmp_path / 'broken' / 'recipe.yaml'} --resume_from_checkpoint" in command
    )
    train(broken)
    assert_end_alike(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("step", [6, 12])  # 12 is the last
def test_a_validation_is_broken_off_and_made_up_for_by_the_next_start(
    step: int, tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_recipe(output_dir=str(tmp_path / "whole"), dropout=0.1, eval_steps=6, per_device_train_batch_size=4)
    train(whole)
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    validate, read = Watch.validate, []

    def batches(shard: Shard, **settings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(validation_batches(shard, **settings)):
            read.append(number)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def with_signal(watch: Watch, done: int) -> None:
        with monkeypatch.context() as patch:
            if done == step:
                patch.setattr(
                    "training.monitoring.monitor.validation_batches", lambda shard, **rest: batches(shard=shard, **rest)
                )
            validate(watch, done)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "validate", with_signal)
        with pytest.raises(SystemExit):
            train(broken)
    assert read == [0, 1]
    assert checkpoints(tmp_path / "broken")[-1].name == f"step-{step:06d}"
    assert [line["step"] for line in read_metrics(tmp_path / "broken") if "val_loss" in line] == list(range(6, step, 6))
    train(broken)
    assert_end_alike(tmp_path / "broken", tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "broken") if "val_loss" in line] == [6, 12]
    assert (tmp_path / "broken" / "samples.txt").read_text() == (tmp_path / "whole" / "samples.txt").read_text()


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_checkpoint_that_falls_due_in_a_validation_is_saved_behind_it(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(save_steps=0, save_minutes=60.0, eval_steps=6, per_device_train_batch_size=4)
    validate, strikes = Watch.validate, []

    def with_a_strike(watch: Watch, done: int) -> None:
        strikes.extend([True] * (done == 6))
        validate(watch, done)

    monkeypatch.setattr(Watch, "validate", with_a_strike)
    monkeypatch.setattr(Saving, "due_by_clock", lambda saving: bool(strikes) and strikes.pop())
    train(recipe)
    assert [path.name for path in checkpoints(Path(recipe.output_dir))] == ["step-000006", "step-000012"]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_that_waits_for_its_corpus_leaves_too_and_loses_no_step(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_recipe(output_dir=str(tmp_path / "whole"), dropout=0.1)
    train(whole)
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    asked = []

    def six_steps_are_there(self: Run, number: int) -> int:
        asked.append(number)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return min(number, 6 * 8)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_least", six_steps_are_there)
        with pytest.raises(SystemExit):
            train(broken)
    assert checkpoints(tmp_path / "broken")[-1].name == "step-000006"
    train(broken)
    assert_end_alike(tmp_path / "broken", tmp_path / "whole")


def test_two_processes_leave_after_the_same_step_when_one_is_told_to(tiny_recipe: Make, tmp_path: Path) -> None:
    long = tiny_recipe(max_steps=100_000, save_steps=10, sample_steps=0, per_device_train_batch_size=1)
    run = Path(long.output_dir)
    # The second time nearly all goes into validations, so the signal comes in the middle of one.
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
            f"stopped after step {step_of(checkpoints(run)[-1]):,} of 100,000; the run goes on"
            in processes.printed.read_text()
        )


def test_without_other_processes_the_own_wish_holds_at_once() -> None:
    agreement = Agreement(1, timeout=None)  # type: ignore[arg-type]
    assert agreement.exchange(15, 1) == [15, 1]
    assert agreement.settled() is None


WATCH = """
import sys, time
from training.checkpoints.signals import SignalWatch
with SignalWatch() as signals:
    print("ready", flush=True)
    while not signals.received:
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_leaves_at_once_but_not_a_launchers_echo_of_the_first(processes: int) -> None:
    environment = {**os.environ, "WORLD_SIZE": str(processes), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", WATCH], stdout=subprocess.PIPE, env=environment) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == b"ready\n"
        watching.send_signal(signal.SIGTERM)
        assert watching.stdout.readline() == b"first\n"
        if processes > 1:
            watching.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                watching.wait(1.1)
        watching.send_signal(signal.SIGTERM)
        assert watching.wait(10) == 143


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


def test_who_is_left_closes_its_trackers_though_the_launcher_ends_it_with_the_first_to_go() -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", LEAVE], stdout=subprocess.PIPE, env=environment) as leaving:
        assert leaving.stdout is not None
        assert leaving.stdout.readline() == b"closing\n"
        leaving.send_signal(signal.SIGTERM)
        assert leaving.stdout.read() == b"closed\n"
        assert leaving.wait(10) == 143


def test_a_launcher_that_is_gone_counts_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    signals = SignalWatch()
    assert signals.received == 0
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert signals.received == signal.SIGTERM


def test_without_a_launcher_a_shell_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    signals = SignalWatch()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert signals.received == 0
