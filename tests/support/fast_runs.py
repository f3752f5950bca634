"""What tiny runs in tests do without: threads, pictures, and the collection of the libraries' objects."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch


def speed_up(patch: Callable[[str, object], None], *, curves: bool = False) -> None:
    """Leave out of runs what takes longer than their training; `patch` sets an attribute by its dotted name.

    Args:
        curves: draw curves as usual.
    """
    # One thread: on shared cores two of them wait for each other longer than these models compute.
    patch("training.setup.accelerator.use_all_cores", lambda: torch.set_num_threads(1))
    patch("training.loop._frozen_gc", contextlib.nullcontext)
    if not curves:
        patch("training.monitoring.monitor.CurvePlotter.start", lambda plotter, output_dir: None)
        patch("training.monitoring.monitor.plot_curves", _no_curves)


def _no_curves(path: Path, runs: object) -> None:
    path.write_bytes(b"curves")
