"""How many threads a process takes."""

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
