"""A training step of our model, of `transformers.GPT2LMHeadModel` and of nanoGPT, eager and compiled.

    python benchmarks/train_step.py [--geometry 6x384 quickstart 124m] [--nanogpt CHECKOUT] [--rounds 7] [--no_compile]

A step is forward pass, loss, backward pass, gradient clipping and fused AdamW, on random tokens. Every side has a
process, because training with ours sets how glibc allocates memory; at 124M, all together need 18 GB. The sides take
turns, and the table gives medians. The bound is the time of the step's bare matrix products: no step can be faster.
Peak memory is without what Python and torch take before the model is built, and with what the compiler keeps.
"""

import argparse
import contextlib
import functools
import multiprocessing
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from step_timing import (
    Geometry,
    Side,
    Step,
    alternate,
    bare_products,
    machine,
    matmul_peak,
    nanogpt,
    official,
    ours,
    seconds,
)

from common.cpus import keep_freed_memory
from training.recipe import QUICKSTART, load_recipe
from training.setup.accelerator import resolve_mixed_precision
from training.setup.model import attention_for

GEOMETRIES = {
    "6x384": Geometry(6, 6, 384, 50_257, 512, 4),
    "quickstart": Geometry(4, 4, 256, 4096, 256, 8),
    "124m": Geometry(12, 12, 768, 50_257, 512, 2),
}


def sides_of(geometry: Geometry, device: str, checkout: Path | None, compiled: bool) -> dict[str, Callable[[], Side]]:
    """Builders of all sides, by name."""
    eager: dict[str, Callable[[], Side]] = {
        "ours": lambda: ours(geometry, device, attention_for(load_recipe(QUICKSTART), device)),
        "GPT2LMHeadModel": lambda: official(geometry, device),
    }
    if checkout is not None:
        eager["nanoGPT"] = lambda: nanogpt(geometry, device, checkout)
    builders = dict(eager)
    if compiled:
        builders |= {f"{name} compiled": lambda build=build: build().compiled() for name, build in eager.items()}
    return builders


def main() -> None:
    """Print a table for each geometry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES))
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; without it this side is skipped")
    parser.add_argument("--rounds", type=int, default=7, help="rounds in which every side takes a step")
    parser.add_argument("--no_compile", action="store_true", help="eager sides only")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = resolve_mixed_precision(load_recipe(QUICKSTART)) == "bf16"
    peak = matmul_peak(device, torch.bfloat16 if bf16 else torch.float32)
    print(
        f"{machine(device)}; {'bf16 autocast' if bf16 else 'fp32'}; matrix products reach {peak / 1e12:.2f} TFLOP/s; "
        f"medians of {arguments.rounds} rounds"
    )
    if arguments.nanogpt is None:
        print("nanoGPT is skipped: pass a checkout with --nanogpt")
    for name in arguments.geometry:
        compare(name, device, arguments.nanogpt, peak, bf16, not arguments.no_compile, arguments.rounds)


def compare(
    name: str, device: str, checkout: Path | None, peak: float, bf16: bool, compiled: bool, rounds: int
) -> None:
    """Print the table of a geometry; `peak` is the FLOP/s of a large matrix product."""
    geometry = GEOMETRIES[name]
    products, flops = bare_products(geometry, device, torch.bfloat16 if bf16 else torch.float32)
    products()
    with contextlib.ExitStack() as stack:
        memory, clocks = {}, []
        for side in sides_of(geometry, device, checkout, compiled):
            connection = stack.enter_context(_process(side, geometry, device, checkout, bf16))
            try:
                memory[side] = connection.recv()
            except EOFError:
                print(f"{side} is skipped: it failed, see above")
                continue
            clocks.append(functools.partial(_seconds, connection))
        *times, bare = alternate([*clocks, lambda: seconds(products, device)], rounds)
    bound = statistics.median(bare)
    ours_best = min(statistics.median(t) for t, side in zip(times, memory, strict=True) if side.startswith("ours"))
    print(
        f"\n{name}: {geometry.n_layer} layers × {geometry.n_embd}, vocabulary {geometry.vocab_size:,}, "
        f"{geometry.batch_size} × {geometry.seq_len} tokens; bare matrix products {1e3 * bound:.0f} ms, "
        f"{geometry.tokens / bound:,.0f} tokens/s, {flops / bound / 1e12:.2f} TFLOP/s\n"
    )
    print("| side | ms | tokens/s | TFLOP/s | share of the peak | of the bound | our best is faster by | peak memory |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for side, each in zip(memory, times, strict=True):
        median = statistics.median(each)
        rate = geometry.tokens * geometry.flops_per_token / median
        print(
            f"| {side} | {1e3 * median:.0f} | {geometry.tokens / median:,.0f} | {rate / 1e12:.2f} | {rate / peak:.0%} "
            f"| {bound / median:.0%} | {median / ours_best:.2f}× | {memory[side] / 2**30:.2f} GiB |",
            flush=True,
        )


@contextlib.contextmanager
def _process(side: str, geometry: Geometry, device: str, checkout: Path | None, bf16: bool) -> Iterator[Connection]:
    """A process for one side; it sends its peak memory, and then the seconds of a step whenever it is asked."""
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_take_steps, args=(other_end, side, geometry, device, checkout, bf16))
    process.start()
    other_end.close()
    try:
        yield connection
    finally:
        connection.close()
        process.join()


def _seconds(connection: Connection) -> float:
    connection.send("step")
    found: float = connection.recv()
    return found


def _take_steps(
    connection: Connection, side: str, geometry: Geometry, device: str, checkout: Path | None, bf16: bool
) -> None:
    if side.startswith("ours"):
        keep_freed_memory()  # as training on a CPU does
    process, done = psutil.Process(), threading.Event()
    before, peak = process.memory_info().rss, 0

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    step = Step(sides_of(geometry, device, checkout, True)[side](), geometry, device, bf16=bf16)
    step.take()  # compile, allocate optimizer state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sampler = threading.Thread(target=sample)
    sampler.start()
    for _ in range(2):
        step.take()
    done.set()
    sampler.join()
    connection.send(torch.cuda.max_memory_allocated() if device == "cuda" else peak - before)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the end of the benchmark
        while connection.recv():
            connection.send(step.seconds())


if __name__ == "__main__":
    main()
