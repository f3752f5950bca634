"""A small corpus with documents of all lengths, and the shards made of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.data.shards.shard_reader import ShardFolder
    from training.data.sources.base import Corpus

WORDS = ["the", "of", "shard", "token", "window", "batch", "model", "loss", "weight", "order", "naïve", "数学"]


def write_corpus(path: Path, documents: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            text = " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 300])))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def documents_of(corpus: "Corpus") -> list[str]:
    """The text of each document."""
    texts: list[list[str]] = []
    for piece in corpus.read():
        if piece.starts:
            texts.append([])
        texts[-1].append(piece.text)
    return ["".join(parts) for parts in texts]


def make_shards(
    folder: Path,
    *,
    num_workers: int = 0,
    wait: bool = False,
    report: Callable[[str], None] = lambda line: None,
    **spec: Any,
) -> "ShardFolder":
    """Fill `folder` as `produce` does; `spec` holds the fields of `ShardSpec`."""
    from training.data.producing.producer import produce
    from training.data.shards.shard_spec import ShardSpec

    return produce(ShardSpec(folder=folder, **spec), num_workers=num_workers, wait=wait, report=report)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
