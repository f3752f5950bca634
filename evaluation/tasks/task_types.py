"""What every task consists of: item -> requests -> scores -> record -> metrics.

`Task.items` reads the data. `evaluation.scoring` computes the scores of each item's requests. `Task.record` turns an
item and its scores into what the model predicted, and what would have been right. Each `Metric` is computed from two
keys of all records.

Requests hold token ids, because a protocol also fixes how the text around the end of the context is tokenized.
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

Ids = tuple[int, ...]


class Encoder(Protocol):
    """Text to ids and back, with no token added; `evaluation.scoring.tokenizer_adapter` wraps Hugging Face's.

    `end_of_text_id` is the context of text that has none. Models expect `bos_ids` before every text; GPT-2 none.
    """

    end_of_text_id: int
    bos_ids: Ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens spelled out in it are plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`, exact even where they begin or end inside a character."""


@dataclass(frozen=True)
class Request:
    """Asks for the sum of log p(token | all tokens before it) over a continuation; neither part is empty.

    The context is truncated on the left if the model has too few positions. The greedy choice ignores the tokens in
    `excluded`; they do not change the log-likelihood.
    """

    context: Ids
    continuation: Ids
    excluded: frozenset[int] = frozenset()

    @functools.cached_property
    def ids(self) -> Ids:
        """Context and continuation."""
        return self.context + self.continuation


@dataclass(frozen=True)
class Generation:
    """Asks for a greedy continuation, shorter if the model ends the text; the context is truncated on the left."""

    context: Ids
    max_new_tokens: int


@dataclass(frozen=True)
class LogLikelihood:
    """The score of a `Request`: log p of the continuation in nats, its tokens, and whether all are the most likely."""

    sum: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class Generated:
    """The score of a `Generation`: the new tokens."""

    ids: Ids


@dataclass(frozen=True)
class Item:
    """A question, a passage, or a window of a document.

    `gold` is the right answer, if there is one. The record is also made from `extra`, such as numbers of words. `data`,
    the `data_hash` of the row or text, is the same for every tokenizer: two models are compared only where it is equal.
    """

    index: int
    requests: tuple[Request | Generation, ...]
    gold: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""


def data_hash(data: Any) -> str:
    """Return a hash of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Metric:
    """A number that a task reports, such as "acc_norm", computed by a module of `evaluation/metrics/`.

    `prediction` and `reference` are keys of the record. "accuracy" compares their values; "perplexity", "loss" and
    "bits_per_byte" take log-likelihoods in nats and counts (of tokens, words, passages or bytes).
    """

    name: str
    module: str
    prediction: str
    reference: str = "gold"


class Task(ABC):
    """A task under one protocol, such as "hellaswag" under "harness".

    The description states the exact handling of the text, and the source where the protocol comes from. The first
    metric is shown on the progress bar.
    """

    name: str
    protocol: str
    description: str
    source: str
    metrics: ClassVar[tuple[Metric, ...]]

    @property
    def full_name(self) -> str:
        """Return name and protocol: "hellaswag:harness"."""
        return f"{self.name}:{self.protocol}"

    @abstractmethod
    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, or all, from the official files in `data_dir`, or from the Hub.

        Raises:
            InputError: the data is missing or malformed.
        """

    @abstractmethod
    def record(self, item: Item, scores: Sequence[Any]) -> dict[str, Any]:
        """Return what the metrics need of an item, in a form that JSON can hold, from the scores of its requests."""


class TextTask(Task):
    """A task that scores running text. Each item has one request; `Item.extra` counts the text in another unit."""

    def record(self, item: Item, scores: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the log-likelihood of the text in nats, and its length in tokens and in the unit of `extra`."""
        [score] = scores
        return {"log_likelihood": score.sum, "tokens": score.tokens, **item.extra}


def argmax(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)
