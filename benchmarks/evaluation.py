"""Time to score a 124M model: with and without shared prefixes, and against lm-evaluation-harness.

    python benchmarks/evaluation.py [--part prefixes harness] [--data_dir ../shared/data] [--rounds 3] [--dtype float32]

All sides score the same items with the same random weights (transformers' GPT2LMHeadModel), alternating in one process.
Medians, and the median ratio of the rounds, are printed. lm-evaluation-harness (the extra `harness`) runs with the
fastest of several batch sizes. Both get token ids, so the time to read the data does not count. It takes about twelve
minutes on two cores.
"""

import argparse
import importlib.util
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# Python puts this folder first on the path, where this file hides the package `evaluation`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

from evaluation.scoring.scorer import score  # noqa: E402
from evaluation.scoring.tokenizer_adapter import TokenizerAdapter  # noqa: E402
from evaluation.tasks.registry import task_named  # noqa: E402
from evaluation.tasks.task_types import Item, Request  # noqa: E402

_PARTS = {
    "prefixes": {"cbt_cn": 4, "hellaswag:harness": 100},
    "harness": {"hellaswag:harness": 100, "lambada": 120},
}
"""Tasks of each part, and how many items."""

_BATCH_SIZES = (2, 4, 8, 16, 32)


def gpt2_tokenizer(data_dir: Path) -> Any:
    """GPT-2's tokenizer of transformers, made from tiktoken's files."""
    from transformers import AutoTokenizer

    from training.data.tokenization.tokenizer import load_tokenizer

    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(data_dir / "tiktoken_cache"))
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer("gpt2").save(folder)
        return AutoTokenizer.from_pretrained(folder)


def items_of(task: str, folder: Path, encoder: TokenizerAdapter, count: int) -> list[Item]:
    """`count` items with the lengths of the real rows, repeated if there are fewer.

    Each gets its own first token, because lm-evaluation-harness scores equal requests only once.
    """
    real = task_named(task).items(folder, encoder, 1024, count)
    items = []
    for index in range(count):
        requests: Sequence[Request] = real[index % len(real)].requests  # type: ignore[assignment]
        items.append(Item(index, tuple(Request((index, *r.context[1:]), r.continuation) for r in requests)))
    return items


def seconds(action: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(title: str, count: int, rounds: int, sides: dict[str, Callable[[], Any]]) -> None:
    """Print each side's items per second, and how much faster the first one is."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    next(iter(sides.values()))()  # warm up
    for _ in range(rounds):
        for name, action in sides.items():
            times[name].append(seconds(action))
    first = next(iter(sides))
    print(f"{title}, {count} items", flush=True)
    for name, values in times.items():
        ratio = statistics.median(b / a for a, b in zip(times[first], values, strict=True))
        faster = "" if name == first else f"  {first} is {ratio:.2f} times as fast"
        print(f"  {name:<34}{count / statistics.median(values):>8.2f} items/s{faster}", flush=True)


def harness(model: Any, tokenizer: Any, items: Sequence[Item]) -> Callable[[int], Callable[[], Any]]:
    """A function from batch size to lm-evaluation-harness scoring `items`."""
    from lm_eval.models.huggingface import HFLM

    requests = [(("", ""), list(r.context), list(r.continuation)) for item in items for r in item.requests]  # type: ignore[union-attr]

    def at(batch_size: int) -> Callable[[], Any]:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        return lambda: lm._loglikelihood_tokens(requests, disable_tqdm=True)

    return at


def main() -> None:
    """Print a table for each task of the selected parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", nargs="+", choices=list(_PARTS), default=list(_PARTS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    flags = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{name}, {versions}; {flags.dtype}, medians of {flags.rounds} rounds")

    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(device, getattr(torch, flags.dtype))
    tokenizer = gpt2_tokenizer(flags.data_dir)
    encoder = TokenizerAdapter(tokenizer)

    for task, count in _PARTS["prefixes"].items() if "prefixes" in flags.part else ():
        items = items_of(task, flags.data_dir, encoder, count)
        sides = {
            "shared prefixes": lambda items=items: score(model, items),
            "separate candidates": lambda items=items: score(model, items, share_prefixes=False),
        }
        compare(task, count, flags.rounds, sides)
    if "harness" not in flags.part:
        return
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("error: lm-evaluation-harness is not installed; pip install -e '.[harness]', or --part prefixes")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    for task, count in _PARTS["harness"].items():
        items = items_of(task, flags.data_dir, encoder, count)
        at = harness(model, tokenizer, items)
        best = min(_BATCH_SIZES, key=lambda size: seconds(at(size)))
        sides = {"ours": lambda items=items: score(model, items), f"lm-evaluation-harness, batch {best}": at(best)}
        compare(task, count, flags.rounds, sides)


if __name__ == "__main__":
    main()
