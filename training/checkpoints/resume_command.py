"""Commands for a run's messages: they resume or extend it, and work as printed from the current folder."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def resume_command(output_dir: Path, newest: Path | None) -> str:
    """The command that resumes a run on as many processes as it has now.

    The `newest` checkpoint is in another folder for a branch without checkpoints of its own.
    """
    is_elsewhere = newest is not None and newest.resolve().parent != (output_dir / "checkpoints").resolve()
    words = [program("accelerate"), "launch", *launch_flags(os.environ), _shown(_ROOT / "training" / "train.py")]
    words += ["--config", str(output_dir / "recipe.yaml")]
    # Explicit although it is the default: recipe.yaml may hold the value of the run's first start.
    words += ["--resume_from_checkpoint", str(newest) if is_elsewhere else "auto"]
    return shlex.join(words)


def extend_command(output_dir: Path, steps: int) -> str:
    """The command that continues a complete run of `steps` steps to twice its length."""
    return f"{resume_command(output_dir, None)} --max_steps {2 * steps}"


def launch_flags(environment: Mapping[str, str]) -> list[str]:
    """The flags of `accelerate launch` that start as many processes again, on the same kind of device.

    Launchers do not pass on the name of their config file, but they set the number and the kind of processes and nodes
    in the environment.
    """
    processes, local = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    uses_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    uses_cpu = uses_cpu or environment.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        flags = ["--config_file", _shown(_ROOT / "accelerate_configs" / "fsdp2_8xa100.yaml")]
    elif processes > 1:
        # accelerate starts several CPU processes only with a config file.
        cpus = ["--config_file", _shown(_ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
        flags = cpus if uses_cpu else ["--multi_gpu"]
    else:
        flags = ["--cpu"] if uses_cpu else []
    flags += ["--num_processes", str(processes)]
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        flags += ["--mixed_precision", precision]
    if processes > local:
        flags += ["--num_machines", str(processes // local), "--machine_rank", environment.get("GROUP_RANK", "0")]
        flags += ["--main_process_ip", environment["MASTER_ADDR"], "--main_process_port", environment["MASTER_PORT"]]
    return flags


def program(name: str) -> str:
    """The command for a program of this Python environment, whether the environment is active or not."""
    return _shown(Path(sys.prefix) / "bin" / name)


def _shown(path: Path) -> str:
    """The path relative to the current folder if it is below, the bare name if PATH finds it, else the full path."""
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name if shutil.which(path.name) == str(path) else str(path)
