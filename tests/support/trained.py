"""What tests compare of trained runs."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from training.monitoring.run_history import read_metrics
from training.recipe import Recipe


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
