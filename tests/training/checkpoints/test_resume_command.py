"""The commands that a run prints to be resumed or extended."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT

from training.checkpoints import resume_command as module
from training.checkpoints.resume_command import extend_command, launch_flags, program, resume_command
from training.recipe import Recipe


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(ROOT)


def test_resume_command_names_the_resolved_recipe() -> None:
    newest = Path("runs/my run/checkpoints/step-000009")
    assert resume_command(Path("runs/my run"), newest) == (
        f"{program('accelerate')} launch --num_processes 1 training/train.py --config 'runs/my run/recipe.yaml' "
        "--resume_from_checkpoint auto"
    )


def test_branch_without_a_checkpoint_of_its_own_resumes_from_where_it_starts() -> None:
    begin = Path("runs/stable/checkpoints/step-000300")
    assert resume_command(Path("runs/branch"), begin).endswith(f" --resume_from_checkpoint {begin}")
    for newest in (None, Path("runs/branch/checkpoints/step-000310")):
        assert resume_command(Path("runs/branch"), newest).endswith(" --resume_from_checkpoint auto")
    # recipe.yaml of a finished run may hold the checkpoint or the `none` of its first start.
    assert extend_command(Path("runs/branch"), 400).endswith(" --resume_from_checkpoint auto --max_steps 800")


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        ({}, "--num_processes 1"),
        ({"ACCELERATE_USE_CPU": "True"}, "--cpu --num_processes 1"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "--multi_gpu --num_processes 8"),
        (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "-1,-1"},
            "--config_file accelerate_configs/cpu_2_processes.yaml --num_processes 2",
        ),
        (
            {
                "WORLD_SIZE": "8",
                "LOCAL_WORLD_SIZE": "8",
                "ACCELERATE_USE_FSDP": "true",
                "ACCELERATE_MIXED_PRECISION": "bf16",
            },
            "--config_file accelerate_configs/fsdp2_8xa100.yaml --num_processes 8 --mixed_precision bf16",
        ),
        (
            {
                "WORLD_SIZE": "16",
                "LOCAL_WORLD_SIZE": "8",
                "GROUP_RANK": "1",
                "MASTER_ADDR": "10.0.0.1",
                "MASTER_PORT": "29500",
            },
            "--multi_gpu --num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 "
            "--main_process_port 29500",
        ),
    ],
)
def test_launch_flags_start_as_many_processes_on_the_same_devices(environment: dict[str, str], flags: str) -> None:
    assert " ".join(launch_flags(environment)) == flags


def test_programs_are_shown_as_they_are_found_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    below = tmp_path / "bin" / "accelerate"
    below.parent.mkdir()
    below.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(below.parent))
    assert module._shown(below) == "accelerate"
    monkeypatch.setenv("PATH", "")
    assert module._shown(below) == str(below)
    monkeypatch.chdir(tmp_path)
    assert module._shown(below) == "bin/accelerate"


@pytest.mark.slow
def test_printed_command_works_as_printed(programs: Path, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    tiny_recipe(max_steps=2).save(tmp_path / "r.yaml")
    command = [programs / "accelerate", "launch", "--quiet", "--config_file", "accelerate_configs/cpu_2_processes.yaml"]
    command += ["--main_process_port", "0", "training/train.py", "--config", tmp_path / "r.yaml"]
    settings = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT}
    first = subprocess.run(command, **settings, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert first.returncode == 0, first.stderr
    printed = first.stdout.strip().splitlines()[-1].strip()
    assert " launch --config_file accelerate_configs/cpu_2_processes.yaml --num_processes 2 training/" in printed
    assert printed.startswith(program("accelerate"))
    # A separate port: other tests may be using accelerate's default one.
    rest = printed.removeprefix(f"{program('accelerate')} launch")
    free_port = f"{programs / 'accelerate'} launch --main_process_port 0{rest}"
    second = subprocess.run(free_port, shell=True, **settings, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert second.returncode == 0, second.stderr
    assert "× 2 processes ×" in second.stdout
    assert "The run is complete: 4 steps" in second.stdout
