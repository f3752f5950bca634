"""The cores of a machine, and how its processes share them."""

import os


def usable_cpus() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_all_cores() -> None:
    """Give torch this process's share of the machine's cores.

    Launchers set OMP_NUM_THREADS=1, which leaves cores idle. Another value is the user's choice and is kept; OpenMP
    also allows lists such as 4,2.
    """
    if os.environ.get("OMP_NUM_THREADS", "").strip() in ("", "1"):
        import torch

        torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
