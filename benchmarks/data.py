"""The data engine's claims about speed, all in one run on one machine.

    python benchmarks/data.py [--rounds 5] [--corpus FILE_OR_FOLDER]

Tokenising: our worker processes on batches, against one process with tiktoken in a loop, and against a pool that maps
one document at a time (build-nanogpt's fineweb.py: `Pool.imap(tokenize, documents, chunksize=16)`), on as many
processes as ours. Each side is warm: its processes run, and have seen the documents once, before the clock starts.
Sides take turns; medians, and the ratio round by round. Loading: shuffled batches of 1,024 tokens a row on one core; a
training step of GPT-2 124M is taken as its FLOPs at the full peak of an A100, which no run reaches. Placing: the first
batch anywhere in 10B tokens, which sparse files stand in for.

Claimed: on two cores 1.8 times the loop and 1.3 times the pool, 50M tokens/s and under 0.5 % of a step, under 50 ms.
"""

import argparse
import functools
import gc
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tiktoken
import torch

# Before benchmarks/, which Python put first and whose evaluation.py is not the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli_errors import InputError, run_command
from common.cpus import usable_cpus
from common.worker_processes import results_in_order, start_workers
from training.data.loading.loader import TrainingWindows, training_batches
from training.data.loading.training_shards import TrainingShards
from training.data.producing.producer import batches
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.sources.base import INSTALLED_DOCS, Document
from training.data.sources.open_corpus import open_corpus
from training.data.tokenization.bpe import EncodeDocuments
from training.data.tokenization.tokenizer import load_tokenizer
from training.monitoring.throughput import PEAKS, flops_per_token
from training.step.batch_plan import plan_batch

_SEQ_LEN = 1024
_TOKENS_PER_SHARD = 100_000_000


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """What build-nanogpt has as a global of its module; read before the pool forks."""
    return tiktoken.get_encoding("gpt2")


def tokenize_one(document: str) -> np.ndarray:
    """One document, as build-nanogpt's `tokenize` does it."""
    tokens = [gpt2().eot_token]
    tokens.extend(gpt2().encode_ordinary(document))
    tokens_np = np.array(tokens)
    assert (tokens_np >= 0).all()
    assert (tokens_np < 2**16).all()
    return tokens_np.astype(np.uint16)


def seconds(side: Callable[[], Iterable[np.ndarray]], expected: int) -> float:
    """Time in which a side makes all its arrays of ids."""
    start = time.perf_counter()
    made = sum(map(len, side()))
    elapsed = time.perf_counter() - start
    assert made == expected, (made, expected)
    return elapsed


def tokenising(documents: list[str], rounds: int, num_workers: int) -> None:
    """Print documents/s of the three sides, and the ratios."""
    tokenizer = load_tokenizer("gpt2")
    encode = EncodeDocuments(tokenizer.bpe, tokenizer.end_of_text_id, "uint16")
    expected = sum(len(tokenize_one(document)) for document in documents)
    with multiprocessing.Pool(num_workers) as pool, start_workers(encode, num_workers) as workers:
        sides: dict[str, Callable[[], Iterable[np.ndarray]]] = {
            "loop": lambda: map(tokenize_one, documents),
            "pool": lambda: pool.imap(tokenize_one, documents, chunksize=16),
            "ours": lambda: results_in_order(
                workers, (batch.texts for batch in batches(map(Document, documents), 0)), num_workers=num_workers
            ),
        }
        for side in sides.values():
            seconds(side, expected)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                times[name].append(seconds(side, expected))
    print(f"tokenising {len(documents):,} documents, {expected:,} tokens of {tokenizer.name}, {num_workers} processes:")
    for name, values in times.items():
        median = statistics.median(values)
        line = f"  {name}: {len(documents) / median:,.0f} documents/s, {expected / median / 1e6:.2f}M tokens/s"
        if name != "ours":
            ratios = [other / mine for other, mine in zip(values, times["ours"], strict=True)]
            line += f"; ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)


def loading(rounds: int) -> None:
    """Print tokens/s of the loader on one core, and its share of a training step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rng = np.random.default_rng(0)
        for number, split in enumerate(("val", "train", "train")):
            np.save(Path(name) / f"x_{split}_{number:06d}.npy", rng.integers(0, 50257, 30_000_000).astype("<u2"))
        source = TrainingShards(ShardFolder.open(name), seq_len=_SEQ_LEN, seed=0)
        plan = plan_batch(tokens_per_step=64 * _SEQ_LEN, seq_len=_SEQ_LEN, per_device=64, num_processes=1)
        rates = []
        for _ in range(rounds + 1):
            start, tokens = time.perf_counter(), 0
            windows = TrainingWindows(source, 50257)
            for inputs, _targets in training_batches(windows, plan, rank=0, first_step=0, end_step=400):
                tokens += inputs.numel()
            rates.append(tokens / (time.perf_counter() - start))
    rate = statistics.median(rates[1:])  # the first warms the page cache
    flops = flops_per_token(parameters=124_439_808, n_layer=12, n_embd=768, seq_len=_SEQ_LEN)
    share = PEAKS["A100"].bf16 / flops / rate
    print(
        f"loading: {rate / 1e6:.0f}M tokens/s shuffled on one core; {share:.2%} of a step at the full peak of an A100"
    )


def placing(rounds: int) -> None:
    """Print how long the first batch takes, anywhere in ten billion tokens."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        shards = []
        for number in range(101):
            path = Path(name) / f"x_{'train' if number else 'val'}_{number:06d}.npy"
            with path.open("wb") as file:
                header = {"descr": "<u2", "fortran_order": False, "shape": (_TOKENS_PER_SHARD,)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + 2 * _TOKENS_PER_SHARD)
            shards.append(Shard(path, "train" if number else "val", _TOKENS_PER_SHARD))
        times, openings = [], []
        # Otherwise one of them pays for Python's look at all of torch's objects, some 90 ms.
        gc.collect()
        gc.freeze()
        plan = plan_batch(tokens_per_step=512 * _SEQ_LEN, seq_len=_SEQ_LEN, per_device=64, num_processes=8)
        for _ in range(4 * rounds):
            step = rng.randrange(10**10 // (512 * _SEQ_LEN))
            start = time.perf_counter()
            folder = ShardFolder.open(name)
            openings.append(time.perf_counter() - start)
            windows = TrainingWindows(TrainingShards(folder, seq_len=_SEQ_LEN, seed=0), 50257)
            next(training_batches(windows, plan, rank=3, first_step=step, end_step=step + 1))
            times.append(time.perf_counter() - start)
    print(
        f"placing: the folder opened and the first batch of 64 rows read anywhere in 10B tokens in "
        f"{1e3 * statistics.median(times):.1f} ms (longest {1e3 * max(times):.1f} ms), "
        f"of which opening {1e3 * statistics.median(openings):.1f} ms"
    )


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corpus", default=INSTALLED_DOCS, help="as in python -m training.prepare")
    parser.add_argument("--workers", type=int, default=min(2, usable_cpus()))
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.workers) < 1:
        raise InputError(
            f"expected a round and a worker at least, found {arguments.rounds} rounds and {arguments.workers} workers"
        )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, tiktoken {tiktoken.__version__}, torch {torch.__version__}; "
        f"medians of {arguments.rounds} rounds"
    )
    load_tokenizer("gpt2")  # where it is not to be had, that is told now
    loading(arguments.rounds)
    placing(arguments.rounds)
    documents = list(open_corpus(arguments.corpus).documents())
    tokenising(documents, arguments.rounds, arguments.workers)


if __name__ == "__main__":
    run_command(main)
