"""Commands, and `accelerate launch` without its launcher, in processes forked from one that has imported torch.

A launcher and two processes that import torch and transformers cost ten seconds of CPU time; these cost one.
"""

import importlib
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import huggingface_hub.constants
import pytest

from support.fast_runs import speed_up
from support.paths import ROOT
from support.processes import FORKED, free_port
from training.recipe import Recipe

TRAIN = ROOT / "training" / "train.py"


def train_in_two(recipe: Recipe, config: str = "cpu_2_processes") -> str:
    """Train in two processes, with a config of `accelerate_configs`, and return their standard output."""
    path = Path(recipe.output_dir).with_suffix(".yaml")
    recipe.save(path)
    done = launched(config, str(TRAIN), "--config", str(path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def launched(config: str, script: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in two CPU processes with the environment of `accelerate launch`, in fp32."""
    return _forked([script, *flags], [_launch_environment(config) | ranks for ranks in _ranks(2)])


def run_python(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a script, or `-m` and a module, with its flags."""
    return _forked([*command], [{**os.environ}])


def _forked(command: list[str], environments: list[dict[str, str]]) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process per environment; when one fails, the others are stopped.

    The output is that of all processes, one after another.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/out-{rank}", f"{folder}/err-{rank}") for rank in range(len(environments))]
        processes = [
            FORKED.Process(target=_run, args=(command, environment, *output))
            for environment, output in zip(environments, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 240
        while any(process.is_alive() for process in processes):
            if time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            elif any(process.exitcode for process in processes):
                for process in processes:
                    process.terminate()
            time.sleep(0.02)
        out, err = ("".join(Path(path).read_text() for path in paths) for paths in zip(*outputs, strict=True))
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, out, err)


def _launch_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` sets for all processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    arguments = ["--config_file", str(path), "--num_processes", "2", "--mixed_precision", "no"]
    parsed, _, _ = _validate_launch_command(
        launch_command_parser().parse_args([*arguments, "--main_process_port", "0", str(TRAIN)])
    )
    return {**prepare_multi_gpu_env(parsed), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _ranks(number: int) -> list[dict[str, str]]:
    """What `torchrun` sets for each process."""
    port = str(free_port())
    common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _run(command: list[str], environment: dict[str, str], out: str, err: str) -> None:
    outputs = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (out, err)]
    run_here(command, environment, [os.open(os.devnull, os.O_RDONLY), *outputs])


def run_here(command: list[str], environment: dict[str, str], streams: list[int], *, curves: bool = False) -> None:
    """Be the process of a command: a script, -c and a program, or -m and a module, with their flags."""
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(each, "r" if each == 0 else "w", closefd=False) for each in range(3))
    os.environ.clear()
    os.environ |= environment
    importlib.reload(huggingface_hub.constants)  # which reads the environment
    speed_up(pytest.MonkeyPatch().setattr, curves=curves)
    while command[0] in ("-P", "-u"):
        command = command[1:]
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.modules.pop(command[1], None)  # a new process has not imported it, and runpy would warn
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(command[1], {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))  # as Python does
        runpy.run_path(command[0], run_name="__main__")
