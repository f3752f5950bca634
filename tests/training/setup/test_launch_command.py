"""The commands that a run prints: launched as the run itself was."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.paths import ROOT

from training.recipe import Recipe
from training.setup.launch_command import continue_command, launch_words, longer_command

BIN = Path(sys.prefix) / "bin"
FLAGS = ["--config", "r.yaml", "--max_steps", "9"]


def be_started(
    monkeypatch: pytest.MonkeyPatch, *, parent: list[str] | None = None, own: list[str] | None = None, script: str
) -> None:
    """Make this process one that was started with FLAGS, by the command line `own` or by a launcher with `parent`."""
    monkeypatch.setattr(sys, "argv", [script, *FLAGS])
    monkeypatch.setattr(sys, "orig_argv", [*(own or ["python", "-u", script]), *FLAGS])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if parent is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [*parent, *FLAGS])
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (
            [f"{BIN}/python", f"{BIN}/accelerate", "launch", "--config_file", "a b.yaml", "training/train.py"],
            "{accelerate} launch --config_file 'a b.yaml' training/train.py",
        ),
        (
            ["python3", "-m", "accelerate.commands.launch", "--num_processes=2", "training/train.py"],
            "python3 -m accelerate.commands.launch --num_processes=2 training/train.py",
        ),
        (
            [f"{BIN}/python", f"{BIN}/torchrun", "--nproc-per-node", "2", "training/train.py"],
            "{torchrun} --nproc-per-node 2 training/train.py",
        ),
    ],
)
def test_a_launcher_is_named_with_its_flags(parent: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    be_started(monkeypatch, parent=parent, script="training/train.py")
    # As it would be found from here: below this folder by its path, else by its name, else by its whole path.
    monkeypatch.setenv("PATH", str(BIN))
    below = f"{BIN.relative_to(ROOT)}/" if BIN.is_relative_to(ROOT) else ""
    expected = expected.format(accelerate=f"{below}accelerate", torchrun=f"{below}torchrun")
    assert shlex.join(launch_words()) == expected
    newest = Path("runs/my run/checkpoints/step-000009")
    assert continue_command(launch_words(), Path("runs/my run"), newest) == (
        f"{expected} --config 'runs/my run/recipe.yaml' --resume_from_checkpoint auto"
    )


def test_a_branch_without_a_checkpoint_of_its_own_goes_on_from_where_it_begins() -> None:
    begin = Path("runs/stable/checkpoints/step-000300")
    assert continue_command(["x"], Path("runs/branch"), begin).endswith(f" --resume_from_checkpoint {begin}")
    for newest in (None, Path("runs/branch/checkpoints/step-000310")):
        assert continue_command(["x"], Path("runs/branch"), newest).endswith(" --resume_from_checkpoint auto")
    # A finished run's recipe may hold the checkpoint or the `none` of its first start.
    assert longer_command(["x"], Path("runs/branch"), 400).endswith(" --resume_from_checkpoint auto --max_steps 800")


def test_a_launched_module_is_named_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ["accelerate", "launch", "-m", "training.train"]
    be_started(monkeypatch, parent=module, script=str(ROOT / "training" / "train.py"))
    assert launch_words() == module


def test_a_run_without_a_launcher_is_started_without_one_again(monkeypatch: pytest.MonkeyPatch) -> None:
    be_started(monkeypatch, own=["python3", "training/train.py"], script="training/train.py")
    assert launch_words() == ["python3", "training/train.py"]


@pytest.mark.parametrize("parent", [[], ["bash"], ["bash", "-c", "training/train.py $FLAGS"]])
def test_a_parent_that_is_no_launcher_is_not_taken_for_one(parent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    be_started(monkeypatch, parent=parent, script="training/train.py")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: parent)
    assert launch_words() == ["python", "-u", "training/train.py"]


def test_another_program_that_trains_is_told_the_usual_command(monkeypatch: pytest.MonkeyPatch) -> None:
    be_started(monkeypatch, own=["python", "-m", "pytest"], script="pytest")
    assert launch_words()[1:] == ["launch", "training/train.py"]


def test_the_printed_command_works_as_printed(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    tiny_recipe(max_steps=2).save(tmp_path / "r.yaml")
    command = [BIN / "accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu_2_processes.yaml"]
    command += ["--main_process_port", "0", "training/train.py", "--config", tmp_path / "r.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT, "env": environment}
    first = subprocess.run(command, **settings)
    assert first.returncode == 0, first.stderr
    longer = first.stdout.strip().splitlines()[-1]
    assert "launch --quiet --config_file accelerate_configs/cpu_2_processes.yaml --main_process_port 0" in longer
    second = subprocess.run(longer, shell=True, **settings)
    assert second.returncode == 0, second.stderr
    assert "× 2 processes ×" in second.stdout
    assert "The run is complete: 4 steps" in second.stdout
