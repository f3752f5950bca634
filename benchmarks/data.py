"""Speed of tokenizing, loading and seeking, measured in one run on one machine.

    python benchmarks/data.py [--rounds 5] [--corpus FILE_OR_FOLDER]

Tokenizing: the producer's worker processes on batches ("ours"), a loop with tiktoken in one process ("loop"), and a
pool that maps one document at a time on as many processes as ours ("pool", build-nanogpt's fineweb.py:
`Pool.imap(tokenize, documents, chunksize=16)`). Every side tokenizes the documents once before it is timed. The sides
alternate; medians of the times, and of the ratio in each round.
Loading: shuffled batches of 1,024 tokens a row on one core. A training step of GPT-2 124M is taken as its FLOPs at the
peak of an A100, which no run reaches.
Seeking: the first batch at a random step of 10B tokens, in sparse files.

Claims: on two cores 1.8 times the loop and 1.3 times the pool; 50M tokens/s and under 0.5 % of a step; under 50 ms.
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

# benchmarks/ comes first on sys.path, and its evaluation.py is not the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli_errors import InputError, run_command
from common.cpus import usable_cpus
from common.worker_processes import results_in_order, start_workers
from training.data.loading.loader import TrainingShards, TrainingWindows, training_batches
from training.data.producing.batches import batches
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.sources.base import INSTALLED_DOCS, Piece
from training.data.sources.open_corpus import open_corpus
from training.data.tokenization.encoding import EncodePieces
from training.data.tokenization.tokenizer import load_tokenizer
from training.monitoring.throughput import PEAKS, flops_per_token
from training.step.batch_plan import plan_batch

_SEQ_LEN = 1024
_TOKENS_PER_SHARD = 100_000_000


@functools.cache
def gpt2() -> tiktoken.Encoding:
    """The encoding that build-nanogpt keeps in a global; loaded before the pool forks."""
    return tiktoken.get_encoding("gpt2")


def tokenize_one(document: str) -> np.ndarray:
    """The ids of a document, as build-nanogpt's `tokenize` computes them."""
    tokens = [gpt2().eot_token]
    tokens.extend(gpt2().encode_ordinary(document))
    tokens_np = np.array(tokens)
    assert (tokens_np >= 0).all()
    assert (tokens_np < 2**16).all()
    return tokens_np.astype(np.uint16)


def seconds(side: Callable[[], Iterable[np.ndarray]], expected: int) -> float:
    """The time in which a side yields all its arrays of ids."""
    start = time.perf_counter()
    tokens = sum(map(len, side()))
    elapsed = time.perf_counter() - start
    assert tokens == expected, (tokens, expected)
    return elapsed


def time_tokenizing(documents: list[str], rounds: int, num_workers: int) -> None:
    """Print documents/s and tokens/s of the three sides, and their ratios."""
    tokenizer = load_tokenizer("gpt2")
    encode = EncodePieces(tokenizer.bpe, tokenizer.document_start, "uint16")
    expected = sum(len(tokenize_one(document)) for document in documents)
    with multiprocessing.Pool(num_workers) as pool, start_workers(encode, num_workers) as workers:
        sides: dict[str, Callable[[], Iterable[np.ndarray]]] = {
            "loop": lambda: map(tokenize_one, documents),
            "pool": lambda: pool.imap(tokenize_one, documents, chunksize=16),
            "ours": lambda: results_in_order(
                workers, (batch.pieces for batch in batches(map(Piece, documents), 0)), num_workers=num_workers
            ),
        }
        for side in sides.values():
            seconds(side, expected)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                times[name].append(seconds(side, expected))
    print(f"tokenizing {len(documents):,} documents, {expected:,} tokens of {tokenizer.name}, {num_workers} processes:")
    for name, values in times.items():
        median = statistics.median(values)
        line = f"  {name}: {len(documents) / median:,.0f} documents/s, {expected / median / 1e6:.2f}M tokens/s"
        if name != "ours":
            ratios = [other / mine for other, mine in zip(values, times["ours"], strict=True)]
            line += f"; ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)


def time_loading(rounds: int) -> None:
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
    rate = statistics.median(rates[1:])  # the first round warms the page cache
    flops = flops_per_token(parameters=124_439_808, n_layer=12, n_embd=768, seq_len=_SEQ_LEN)
    share = PEAKS["A100"][0] / flops / rate
    print(f"loading: {rate / 1e6:.0f}M tokens/s shuffled on one core; {share:.2%} of a step at the peak of an A100")


def time_seeking(rounds: int) -> None:
    """Print how long the first batch takes at a random step of 10B tokens."""
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
        # Otherwise the garbage collector traverses all of torch's objects during one of the rounds, some 90 ms.
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
        f"seeking: {1e3 * statistics.median(times):.1f} ms (at most {1e3 * max(times):.1f} ms) to open 10B tokens and "
        f"read the first batch of 64 rows; {1e3 * statistics.median(openings):.1f} ms of it to open the folder"
    )


def main() -> None:
    """Run the three benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--corpus", default=INSTALLED_DOCS, help="as in python -m training.prepare")
    parser.add_argument("--workers", type=int, default=min(2, usable_cpus()))
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.workers) < 1:
        raise InputError(f"--rounds and --workers must be at least 1, found {arguments.rounds} and {arguments.workers}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python "
        f"{platform.python_version()}, tiktoken {tiktoken.__version__}, torch {torch.__version__}; "
        f"medians of {arguments.rounds} rounds"
    )
    load_tokenizer("gpt2")  # raises now if it cannot be downloaded
    time_loading(arguments.rounds)
    time_seeking(arguments.rounds)
    documents: list[str] = []
    for piece in open_corpus(arguments.corpus).read():
        documents += [""] * piece.starts
        documents[-1] += piece.text
    time_tokenizing(documents, arguments.rounds, arguments.workers)


if __name__ == "__main__":
    run_command(main)
