"""What tests compare of trained runs."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from support.paths import ROOT
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe


def launched(recipe: Recipe, path: Path, *, processes: int = 1) -> "subprocess.CompletedProcess[str]":
    """Train under `accelerate launch`."""
    recipe.save(path)
    config = "cpu.yaml" if processes == 1 else "cpu_2_processes.yaml"
    command = [Path(sys.executable).parent / "accelerate", "launch", "--quiet"]
    command += ["--config_file", ROOT / "accelerate_configs" / config, "--main_process_port", "0"]
    command += [ROOT / "training" / "train.py", "--config", path]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def optimizer_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "training_state" / "optimizer.safetensors")


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def losses(recipe: Recipe) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name]
        for line in read_metrics(Path(recipe.output_dir))
        for name in ("train_loss", "val_loss")
        if name in line
    }


def run_of(recipe: Recipe) -> Path:
    return Path(recipe.output_dir)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
