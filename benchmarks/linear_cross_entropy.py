"""LM head and loss, forward and backward: ours in chunks, full logits, and torch's own chunks (torch 2.13).

    python benchmarks/linear_cross_entropy.py [--rounds 9]

All sides run in one process, in turn, with products in bf16 where the hardware has them, or else in fp32; medians, and
the median ratio to ours in each round.
"""

import argparse
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_scratch import linear_cross_entropy
from training.recipe import QUICKSTART, load_recipe
from training.setup.accelerator import resolve_mixed_precision

SHAPES = [(8192, 256, 4096), (4096, 384, 50257)]  # tokens, width, vocabulary


def full(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain way: logits (tokens, vocabulary) in fp32."""
    return F.cross_entropy((hidden_states @ weight.T).float(), targets)


def torchs(hidden_states: Tensor, weight: Tensor, targets: Tensor, **chunks: Any) -> Tensor:
    """torch's function, which autocast does not know; `chunks` are `LinearCrossEntropyOptions`."""
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(hidden_states.to(dtype), weight.to(dtype), targets, options=options).float()


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], device: str, *, bf16: bool) -> float:
    """Time of one forward and backward pass."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        result = loss(*inputs)
    result.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    bf16 = resolve_mixed_precision(load_recipe(QUICKSTART)) == "bf16"
    sides: dict[str, Callable[..., Tensor]] = {"ours": linear_cross_entropy, "full logits": full}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        sides["torch's chunks"] = torchs
        sides["torch's chunks of 1,024"] = functools.partial(torchs, chunking_method=None, batch_chunk_size=1024)
    print(
        f"{name}, {'bf16' if bf16 else 'fp32'}, torch {torch.__version__}, Python {platform.python_version()}; "
        f"medians of {rounds} rounds"
    )
    for tokens, width, vocabulary in SHAPES:
        torch.manual_seed(0)
        hidden_states = torch.randn(tokens, width, device=device, requires_grad=True)
        weight = (0.02 * torch.randn(vocabulary, width, device=device)).requires_grad_()
        inputs = (hidden_states, weight, torch.randint(vocabulary, (tokens,), device=device))
        times: dict[str, list[float]] = {label: [] for label in sides}
        for turn in range(rounds + 2):
            for label, loss in sides.items():
                elapsed = seconds(loss, inputs, device, bf16=bf16)
                if turn >= 2:  # the first two warm up
                    times[label].append(elapsed)
        results = []
        for label, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times["ours"], strict=True))
            results.append(f"{label} {1e3 * statistics.median(values):.0f} ms ({ratio:.2f})")
        print(f"{tokens} tokens × {width}, vocabulary {vocabulary}: {', '.join(results)}")


if __name__ == "__main__":
    main()
