"""The cores of a machine, how its processes share them, and how glibc allocates memory."""

import ctypes
import os

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NO_LIMIT = -1
_LARGEST_OF_OLD_GLIBC = 32 << 20  # bytes; before 2.35


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


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    By default it returns much of it to the kernel. The kernel then zeroes these pages again in every training step.
    Before version 2.35, buffers over 32 MB are returned all the same. Other C libraries are left alone.
    """
    mallopt = None if os.name == "nt" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(_M_MMAP_THRESHOLD, _NO_LIMIT):
            mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_OLD_GLIBC)
        mallopt(_M_TRIM_THRESHOLD, _NO_LIMIT)
