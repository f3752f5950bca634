"""Throughput, peak FLOP/s and memory."""

import math
import mmap

import pytest
import torch

from training.monitoring import throughput as speed
from training.monitoring.throughput import Throughput, device_name, flops_per_token, memory_bytes, peak_flops


def set_clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    clock = iter(times)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))


def test_throughput_excludes_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 10.0, 30.0, 40.0, 41.0)
    throughput = Throughput()
    throughput.add(600)
    with throughput.pause():  # from 10 to 30
        pass
    assert throughput.take() == 600 / 20  # 40 seconds, 20 of them paused
    throughput.add(5)
    assert throughput.take() == 5.0  # counted from zero


def test_the_time_left_includes_pauses_and_forgets_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, 0.0, 0.0, 60.0, 70.0, 75.0, 85.0)
    throughput = Throughput()
    assert throughput.take() == 0.0
    assert math.isnan(throughput.seconds_left(100))  # nothing is known yet
    throughput.add(100)
    assert throughput.take() == 100 / 60  # with the one-time costs of a start
    assert throughput.seconds_left(1000) == 1000 * 0.6
    throughput.add(100)
    with throughput.pause():  # from 70 to 75
        pass
    throughput.take()  # 60 to 85, of which 5 were paused
    assert throughput.seconds_left(1000) == pytest.approx(1000 * 25 / 100)


def test_flops_of_the_124m_model_are_those_of_the_literature() -> None:
    flops = flops_per_token(parameters=124_439_808, n_layer=12, n_embd=768, seq_len=1024)
    assert flops == pytest.approx(0.86e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA A10", 125, 62.5),
        ("NVIDIA A10G", 70, 35),
        ("NVIDIA H100 80GB HBM3", 989, 495),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989, 495),
        ("NVIDIA L4", 121, 60.5),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("NVIDIA GeForce RTX 3090 Ti", 80, 40),
        ("Tesla T4", 65, 8.1),
        ("Tesla V100-SXM2-16GB", 125, 15.7),
    ],
)
def test_peaks_are_found_by_the_names_that_cuda_gives(name: str, bf16: float, fp32: float) -> None:
    assert peak_flops(name, "bf16") == bf16 * 1e12
    assert peak_flops(name, "no") == fp32 * 1e12


def test_unknown_gpus_and_cpus_have_no_peak() -> None:
    assert peak_flops("Some GPU") is None
    assert peak_flops(device_name(torch.device("cpu"))) is None


def test_memory_grows_with_what_is_allocated() -> None:
    before = memory_bytes(torch.device("cpu"))
    with mmap.mmap(-1, 64 * 2**20) as held:  # from the kernel: glibc may have kept as much of other tests
        held.write(bytes(len(held)))
        # Memory of other tests may be freed meanwhile.
        assert memory_bytes(torch.device("cpu")) - before > len(held) / 2
