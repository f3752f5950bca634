"""What several tests need: the shared data where it is there, a small corpus, and a recipe that trains on it."""

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.small_corpora import WORDS, make_shards, write_corpus

from training.recipe import Recipe

if TYPE_CHECKING:
    from support.loopback_hub import LoopbackHub


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-cases", type=int, default=40, help="damaged folders per test of test_damaged_folders.py")
    parser.addoption("--fuzz-seed", type=int, default=0)


def pytest_configure(config: pytest.Config) -> None:
    # Nothing may reach for the network by accident, unless the tests that need it were asked for.
    if "not network" in config.option.markexpr:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # The models are tiny: two threads of one process would only wait for each other, and for the other workers.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # No test outlives a power failure, and thousands of small files would wait for the disk.
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def _transformers_as_loud_as_before() -> Iterator[None]:
    """Commands that run in this process silence transformers, and later tests may listen to it."""
    yield
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_warning()
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """The folder of a `python` and an `accelerate` that start without importing torch."""
    from support.forked_python import forked_python

    with forked_python() as folder:
        yield folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines file of 400 documents that a small model can learn something from."""
    rng = random.Random(0)
    subjects = ["The model", "A shard", "The loader", "Every token", "One process", "The order"]
    verbs = ["reads", "keeps", "predicts", "writes", "follows", "returns"]
    objects = ["the next window", "a batch of tokens", "its own place", "the whole corpus", "the same text"]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(400):
            text = " ".join(f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(objects)}." for _ in range(12))
            file.write(f'{{"text": "{text}"}}\n')
    return path


@pytest.fixture(scope="session")
def shard_folder(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete shard folder of that corpus: a validation shard and several training shards."""
    folder = tmp_path_factory.mktemp("shards") / "data"
    make_shards(
        folder, corpus=str(text_file), tokenizer="train:300", shard_tokens=9_000, val_tokens=2_000, num_workers=1
    )
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines file for the producer, with documents of all lengths."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", 400)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of 300 ids."""
    from training.data.tokenization.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([" ".join(WORDS)] * 9, 300).save(folder)
    return folder


@pytest.fixture
def settings(corpus: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """The arguments of `make_shards` in most tests."""
    return {
        "corpus": str(corpus),
        "tokenizer": str(tokenizer_folder),
        "shard_tokens": 5_000,
        "val_tokens": 1_500,
    }


@pytest.fixture
def tiny_recipe(text_file: Path, shard_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe that trains in a second or two, on the shared shard folder; any key can be changed."""

    def make(**changes: Any) -> Recipe:
        values: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "data_dir": str(shard_folder),
            "corpus": str(text_file),
            "tokenizer": "train:300",
            "shard_tokens": 9_000,
            "val_tokens": 2_000,
            "seq_len": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "tokens_per_step": 256,
            "per_device_train_batch_size": 4,
            "max_steps": 12,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "eval_steps": 6,
            "eval_tokens": 1_000,
            "sample_steps": 6,
            "sample_prompts": ["The model"],
            "sample_tokens": 8,
            "save_steps": 4,
            "mixed_precision": "no",
        }
        if changes.get("init_from"):  # which has its own sizes
            values |= {"n_layer": None, "n_head": None, "n_embd": None}
        return Recipe(**{**values, **changes})

    return make


@pytest.fixture
def drawn_curves() -> None:
    """Runs draw their curves, which takes longer than training."""


@pytest.fixture
def fresh_accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its state in singletons; a test that trains in this process starts and leaves without them."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from support.fast_runs import collect_nothing, speed_up

    def forget() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    speed_up(monkeypatch.setattr, curves="drawn_curves" in request.fixturenames)
    collect_nothing(monkeypatch.setattr)
    forget()
    yield
    forget()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["LoopbackHub"]:
    """A Hub on this machine, with users, that the client of this process talks to."""
    # Not above: the Hub's client reads at its import whether it may go online.
    import huggingface_hub
    from support.hub_client import ACCOUNTS, point_client_at
    from support.loopback_hub import LoopbackHub, serving

    hub = LoopbackHub(accounts=ACCOUNTS)
    point_client_at(hub, monkeypatch, tmp_path / "hub-cache")
    with serving(hub):
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pauses that a test can wait for, in our retries and in the client's own."""
    import huggingface_hub
    import huggingface_hub.utils._http as client

    monkeypatch.setattr("training.hub.publisher.FIRST_PAUSE_SECONDS", 0.05)
    real = client._http_backoff_base
    monkeypatch.setattr(
        client,
        "_http_backoff_base",
        lambda *args, **kwargs: real(*args, **{**kwargs, "base_wait_time": 0.01, "max_wait_time": 0.02}),
    )
    yield
    huggingface_hub.set_client_factory(client.default_client_factory)
