"""Waiting for child processes, finding them, and a corpus that keeps a producer busy."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path


def processes_that_name(text: str) -> list[int]:
    """Processes other than this one whose command line contains `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text.encode() in command and state[0] != "Z" and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def slow_corpus(path: Path) -> Path:
    """A corpus that keeps the producer busy for some seconds."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in ("to", "ken", "win", "shard", "ba") for b in ("s", "dow", "ch", "ing", "er")]
    with path.open("w") as file:
        for _ in range(20_000):
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=200))}) + "\n")
    return path
