"""How many threads a process takes, and what it does with freed memory."""

import platform
import subprocess
import sys

import pytest
import torch

from common.cpus import usable_cpus, use_all_cores


@pytest.mark.parametrize(("setting", "is_kept"), [("1", False), ("", False), ("4", True), ("4,2", True), ("x", True)])
def test_only_the_setting_of_a_launcher_is_replaced(
    setting: str, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    use_all_cores()
    assert chosen == ([] if is_kept else [usable_cpus()])


GLIBC = platform.libc_ver()


@pytest.mark.skipif(GLIBC[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("megabytes", "operations"), [(4, 12), (48, 2)])
def test_kept_memory_is_not_cleared_again_by_the_kernel(megabytes: int, operations: int) -> None:
    if megabytes > 32 and tuple(map(int, GLIBC[1].split("."))) < (2, 35):
        pytest.skip("glibc before 2.35 returns buffers over 32 MB")
    program = """
import ctypes, resource, sys
import torch
from common.cpus import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size on every machine
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    hidden = torch.ones(int(sys.argv[2]) << 18, requires_grad=True)
    for _ in range(int(sys.argv[3])):
        hidden = hidden.exp() * 0
    hidden.sum().backward()

for count in range(30):
    if count == 6:
        before = page_faults()
    step()
print(page_faults() - before)
"""
    sizes = str(megabytes), str(operations)
    faults = {
        argument: int(subprocess.check_output([sys.executable, "-c", program, argument, *sizes], text=True))
        for argument in ("keep", "default")
    }
    # Measured: 1 to 6,000 and 40,000 to 70,000 with 4 MB; 0 to 100 and over 500,000 with 48 MB.
    assert 2 * faults["keep"] < faults["default"]
