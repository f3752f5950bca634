"""Two hosts with a network between them: a run has the losses of one host, whatever the network does to it.

Every host has an address and a network of its own (`support.two_hosts`); they share the disk.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.paths import ROOT
from support.processes import ProcessesOfARun
from support.trained import losses
from support.two_hosts import ADDRESSES, TwoHosts, why_unavailable

from training.checkpoints.checkpoint_folder import checkpoints
from training.recipe import Recipe

Make = Callable[..., Recipe]
Start = Callable[..., ProcessesOfARun]

pytestmark = pytest.mark.slow

LOST = "error: the connection to another process was lost ("
# A constant learning rate, so that shorter runs have the same losses.
RECIPE = {"max_steps": 24, "eval_steps": 12, "save_steps": 4, "sample_steps": 0, "lr_scheduler_type": "constant"}

SLOW = 0.01  # seconds of delay, so that a run does not end before it is disturbed


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    if reason := why_unavailable():
        pytest.skip(reason)
    with TwoHosts() as hosts:
        yield hosts


@pytest.fixture
def start(hosts: TwoHosts, tmp_path: Path) -> Iterator[Start]:
    """Start one process on each host, and leave neither processes nor a disturbed cable."""
    started = []

    def start(recipe: Recipe, second: Recipe | None = None, *, timeout_seconds: float | None = None) -> ProcessesOfARun:
        paths = [tmp_path / f"{number}.yaml" for number in range(2)]
        for path, each in zip(paths, (recipe, second or recipe), strict=True):
            each.save(path)
        started.append(
            ProcessesOfARun(
                paths,
                2,
                tmp_path / "printed",
                timeout_seconds=timeout_seconds,
                hosts=hosts.names,
                address=ADDRESSES[0],
            )
        )
        return started[-1]

    yield start
    hosts.cable.repair()
    for processes in started:
        processes.kill()


@pytest.fixture(scope="module")
def on_one_host() -> dict[str, dict[tuple[int, str], float]]:
    return {}


@pytest.fixture
def recipe(tiny_recipe: Make) -> Recipe:
    return tiny_recipe(**RECIPE)


@pytest.fixture
def expected(
    recipe: Recipe, tmp_path: Path, on_one_host: dict[str, dict[tuple[int, str], float]]
) -> dict[tuple[int, str], float]:
    """The losses of two processes on one host; they are trained once."""
    if not on_one_host:
        reference = dataclasses.replace(recipe, output_dir=str(tmp_path / "reference"))
        reference.save(tmp_path / "reference.yaml")
        processes = ProcessesOfARun(tmp_path / "reference.yaml", 2, tmp_path / "reference.txt")
        assert processes.wait() == [0, 0], processes.printed.read_text()
        on_one_host["losses"] = losses(reference)
    return on_one_host["losses"]


def wait_for_checkpoint(recipe: Recipe, processes: ProcessesOfARun) -> None:
    while not checkpoints(Path(recipe.output_dir)):
        assert processes.alive, processes.printed.read_text()
        time.sleep(0.01)


def errors_in(printed: str) -> list[str]:
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if line.startswith("error: ")]


@pytest.mark.timeout(600)
def test_hosts_whose_code_differs_are_refused_and_equal_ones_train_with_the_losses_of_one_host(
    hosts: TwoHosts, programs: Path, recipe: Recipe, expected: dict[tuple[int, str], float], tmp_path: Path
) -> None:
    recipe.save(tmp_path / "recipe.yaml")
    other_code = tmp_path / "checkout"
    for name in ("common", "gpt2_scratch", "evaluation", "training"):
        shutil.copytree(ROOT / name, other_code / name)
    with (other_code / "training" / "loop.py").open("a") as file:
        file.write("# a change\n")

    def launch(*roots: Path) -> tuple[list[int], list[str]]:
        launchers, files = [], [tmp_path / f"launched-{rank}" for rank in range(2)]
        for rank, root in enumerate(roots):
            command = ["ip", "netns", "exec", hosts.names[rank], programs / "accelerate", "launch"]
            command += ["--config_file", ROOT / "accelerate_configs" / "multi_node_ddp.yaml", "--num_processes", "2"]
            command += ["--mixed_precision", "no", "--main_process_ip", ADDRESSES[0], "--machine_rank", str(rank)]
            command += [root / "training" / "train.py", "--config", tmp_path / "recipe.yaml"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            if root is not ROOT:  # the forked processes have imported our code
                environment["PYTHON_EXEC"] = sys.executable
            with files[rank].open("w") as file:
                launchers.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        try:
            codes = [launcher.wait(timeout=240) for launcher in launchers]
        finally:
            for launcher in launchers:
                launcher.terminate()  # which ends its process too
                launcher.wait()
        return codes, [file.read_text() for file in files]

    codes, printed = launch(ROOT, other_code)
    assert codes == [1, 1]
    for each in printed:
        assert "error: the nodes do not match: code is " in each
        assert "give every node the same code" in each
    assert not Path(recipe.output_dir).exists()

    codes, printed = launch(ROOT, ROOT)
    assert codes == [0, 0], printed
    # Not to the last bit: a launched process computes with all cores.
    assert losses(recipe) == pytest.approx(expected, rel=1e-6)


def test_delay_and_lost_packets_change_nothing(
    hosts: TwoHosts, start: Start, recipe: Recipe, expected: dict[tuple[int, str], float]
) -> None:
    hosts.cable.delay_seconds, hosts.cable.loss, lost = 0.1, 0.02, hosts.cable.lost  # 0.2 s there and back
    short = dataclasses.replace(recipe, max_steps=6, eval_steps=0)
    processes = start(short)
    assert processes.wait() == [0, 0], processes.printed.read_text()
    assert hosts.cable.lost > lost
    found = {key: loss for key, loss in losses(short).items() if key[1] == "train_loss"}
    assert len(found) == 6
    assert found == {key: expected[key] for key in found}


def test_link_that_is_down_for_ten_seconds_is_waited_out(
    hosts: TwoHosts, start: Start, recipe: Recipe, expected: dict[tuple[int, str], float]
) -> None:
    hosts.cable.delay_seconds = SLOW
    processes = start(recipe)
    wait_for_checkpoint(recipe, processes)
    hosts.cable.is_down, lost = True, hosts.cable.lost
    time.sleep(10)
    assert hosts.cable.lost > lost
    assert all(process.is_alive() for process in processes.processes), processes.printed.read_text()
    hosts.cable.repair()
    assert processes.wait() == [0, 0], processes.printed.read_text()
    assert losses(recipe) == expected


@pytest.mark.parametrize("victim", ["the first host", "the second host", "the link"])
def test_after_a_failure_both_hosts_end_with_one_line_and_the_same_command_resumes(
    victim: str, hosts: TwoHosts, start: Start, recipe: Recipe, expected: dict[tuple[int, str], float]
) -> None:
    hosts.cable.delay_seconds = SLOW
    processes = start(recipe, timeout_seconds=10.0)
    wait_for_checkpoint(recipe, processes)
    if victim == "the link":
        hosts.cable.is_down = True
        codes = [2, 2]
    else:
        dead = int(victim == "the second host")
        processes.send(signal.SIGKILL, dead)
        codes = [-9, 2] if dead == 0 else [2, -9]
    assert processes.wait() == codes
    errors = errors_in(processes.printed.read_text())
    assert len(errors) == codes.count(2)
    assert all(line.startswith(LOST) and "start the same command again on every node" in line for line in errors)

    hosts.cable.repair()
    again = start(recipe)
    assert again.wait() == [0, 0], again.printed.read_text()
    assert "resumed from" in again.printed.read_text()
    assert losses(recipe) == expected


@pytest.mark.parametrize("difference", ["data", "recipe"])
def test_host_with_other_data_or_another_recipe_is_refused_on_both(
    difference: str, start: Start, recipe: Recipe, text_file: Path, tmp_path: Path
) -> None:
    other = dataclasses.replace(recipe, weight_decay=0.2)
    if difference == "data":
        texts = text_file.read_text().splitlines(keepends=True)
        (tmp_path / "corpus.jsonl").write_text("".join(reversed(texts)))
        other = dataclasses.replace(recipe, corpus=str(tmp_path / "corpus.jsonl"), data_dir=str(tmp_path / "data"))
    processes = start(recipe, other)
    assert processes.wait() == [2, 2]
    errors = errors_in(processes.printed.read_text())
    assert len(errors) == 2
    assert len(set(errors)) == 1
    named = "data: " if difference == "data" else "weight_decay is 0.1 on rank 0, 0.2 on rank 1"
    assert errors[0].startswith(f"error: the nodes do not match: {named}")
    assert not Path(recipe.output_dir).exists()
