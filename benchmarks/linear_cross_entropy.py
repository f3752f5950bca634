"""LM head and loss, forward and backward: ours in chunks against full logits.

    python benchmarks/linear_cross_entropy.py [--rounds 9]

Both sides run in one process, in turn, under bf16 autocast; medians, and the ratio round by round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_scratch import linear_cross_entropy

SHAPES = [(8192, 256, 4096), (4096, 384, 50257)]  # tokens, width, vocabulary


def full(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain way: logits (tokens, vocabulary) in fp32."""
    return F.cross_entropy((hidden_states @ weight.T).float(), targets)


def seconds(loss: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], device: str) -> float:
    """Time of one forward and backward pass."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16):
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
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}; medians of {rounds} rounds")
    for tokens, width, vocabulary in SHAPES:
        torch.manual_seed(0)
        hidden_states = torch.randn(tokens, width, device=device, requires_grad=True)
        weight = (0.02 * torch.randn(vocabulary, width, device=device)).requires_grad_()
        inputs = (hidden_states, weight, torch.randint(vocabulary, (tokens,), device=device))
        times: dict[str, list[float]] = {"full": [], "chunked": []}
        for turn in range(rounds + 2):
            for label, loss in (("full", full), ("chunked", linear_cross_entropy)):
                elapsed = seconds(loss, inputs, device)
                if turn >= 2:  # the first two warm up
                    times[label].append(elapsed)
        ratio = statistics.median(a / b for a, b in zip(times["full"], times["chunked"], strict=True))
        medians = {label: f"{1e3 * statistics.median(values):.0f} ms" for label, values in times.items()}
        print(
            f"{tokens} tokens × {width}, vocabulary {vocabulary}: "
            f"full {medians['full']}, chunked {medians['chunked']}, ratio {ratio:.1f}"
        )


if __name__ == "__main__":
    main()
