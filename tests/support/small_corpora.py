"""A small corpus with documents of all lengths, and a look at what became of it."""

import json
import random
from pathlib import Path

WORDS = ["the", "of", "shard", "token", "window", "batch", "model", "loss", "weight", "order", "naïve", "数学"]


def write_corpus(path: Path, documents: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            text = " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 300])))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
