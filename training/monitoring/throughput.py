"""Throughput, model FLOPs utilization (MFU), memory, and the estimate of the time left."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

# Peak FLOP/s of dense matrix products: in bf16 or fp16, and in fp32 with TF32 allowed.
# From the vendor: data sheets of H100, H200, B200, A100, A10, L4, L40S, V100, T4; white papers of the GA102 and AD102
# chips, appendix "comparison", for the RTX cards. Data sheets give values with sparsity; these are half of them. Values
# of the RTX cards are with fp32 accumulation, which torch uses. Longer names come first: "H100 PCIe" contains "H100",
# and "A100" contains "A10".
PEAKS = {
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417e12),
    "H100": (989e12, 495e12),
    "H200 NVL": (835e12, 417e12),
    "H200": (989e12, 495e12),
    "GH200": (989e12, 495e12),
    "B200": (2250e12, 1125e12),
    "A100": (312e12, 156e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 62.5e12),
    "L40S": (362e12, 183e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 60.5e12),
    "RTX 4090 D": (147e12, 73.5e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090 Ti": (80e12, 40e12),
    "RTX 3090": (71e12, 35.6e12),
    # No TF32, and bf16 only in software.
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def device_name(device: torch.device) -> str:
    """The device's name for logs: the GPU's model, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} CPU thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def peak_flops(device_name: str, mixed_precision: str = "bf16") -> float | None:
    """Peak FLOP/s of one GPU in the precision of the run ("bf16", "fp16" or "no"); None for an unknown device.

    A run in fp32 is compared with the fp32 peak: on a T4 8.1 and not 65 TFLOP/s.
    """
    found = next((peak for name, peak in PEAKS.items() if name in device_name), None)
    return found and found[1 if mixed_precision == "no" else 0]


def flops_per_token(*, parameters: int, n_layer: int, n_embd: int, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass: 6N + 12·L·n_embd·T (PaLM paper, appendix B).

    N counts the tied token embedding once, for the head; the lookup costs no FLOPs. As in nanoGPT and build-nanogpt, N
    includes the position embedding (0.6 % at 124M), and attention is counted in full, not only its causal half.
    """
    return 6.0 * parameters + 12.0 * n_layer * n_embd * seq_len


def memory_bytes(device: torch.device) -> int:
    """Memory of this process: the peak allocated on a GPU, or the current resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class Throughput:
    """Tokens per second of training itself: pauses for validation, samples and checkpoints are excluded."""

    def __init__(self) -> None:
        self._paused = 0.0
        self._tokens = 0
        self._marks = [(time.perf_counter(), 0)]  # the start and all calls of `take`: time, tokens since the start

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished step."""
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def take(self) -> float:
        """Tokens per second since the last call."""
        now, (since, tokens) = time.perf_counter(), self._marks[-1]
        seconds = now - since - self._paused
        if self._tokens == tokens:  # training has only begun
            self._marks.pop()
        self._marks.append((now, self._tokens))
        self._paused = 0.0
        return (self._tokens - tokens) / seconds if seconds > 0 else 0.0

    def seconds_left(self, tokens_left: int) -> float:
        """Estimated time for `tokens_left`, from the pace of this start, pauses included; NaN before the first call.

        The first logged step is ignored once there are others: it includes one-time costs such as compiling.
        """
        (start, before), (end, after) = self._marks[1 if len(self._marks) > 2 else 0], self._marks[-1]
        return tokens_left * (end - start) / (after - before) if after > before else math.nan
