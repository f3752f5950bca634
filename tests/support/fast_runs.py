"""What tiny runs in tests do without: threads, pictures and garbage collection."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch


def speed_up(patch: Callable[[str, object], None], *, curves: bool = False) -> None:
    """Leave out of runs what takes longer than their training; `patch` sets an attribute by its dotted name.

    Args:
        curves: draw curves as usual.
    """
    # One thread: on shared cores two of them wait for each other longer than these models compute.
    patch("training.setup.accelerator.use_all_cores", lambda: torch.set_num_threads(1))
    if not curves:
        patch("training.monitoring.monitor.CurvePlotter.start", lambda plotter, output_dir: None)
        patch("training.monitoring.monitor.plot_curves", _no_curves)


def collect_nothing(patch: Callable[[str, object], None]) -> None:
    """Leave out garbage collections, which take seconds in a process with thousands of tests.

    Not where several processes train: see `shut_down`.
    """
    for module in ("training.loop", "training.setup.accelerator", "accelerate.utils.memory"):
        patch(f"{module}.gc", SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None))


def _no_curves(path: Path, runs: object) -> None:
    path.write_bytes(b"curves")
