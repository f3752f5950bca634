"""Runs under `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT
from training.recipe import Recipe


def launched(recipe: Recipe, config: str) -> str:
    """Train in two processes, and return their standard output."""
    path = Path(recipe.output_dir).with_suffix(".yaml")
    recipe.save(path)
    command = [Path(sys.executable).parent / "accelerate", "launch", "--quiet", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0"]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml"]
    command += [ROOT / "training" / "train.py", "--config", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
