"""What a task asks of a model, and what comes back: the vocabulary that tasks, scoring and reports share.

A task turns data into items (a question, a passage, a window of a document); an item asks for log-likelihoods of
continuations, or for generated tokens; scoring answers in the item's order; the task turns the answers into a record,
which is what a report keeps and what the metrics are computed from. Everything here is token ids: how the boundary
between context and continuation is tokenised is part of a protocol.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

Ids = tuple[int, ...]


class Encoder(Protocol):
    """Text to ids and back, with no token added; `evaluation.scoring.tokenizer_adapter` wraps Hugging Face's."""

    @property
    def end_of_text_id(self) -> int:
        """The token that stands before a text that has nothing before it."""

    @property
    def beginning(self) -> Ids:
        """The tokens that the model has seen before every text: none for GPT-2, often the one for a beginning."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as plain text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes that `ids` stand for."""


@dataclass(frozen=True)
class Request:
    """A log-likelihood to compute: the sum of log p(token | all before it) over the continuation.

    Attributes:
        context: what stands before; cut from the left where the model has too few positions. Not empty.
        continuation: the tokens to score; not empty.
        excluded: tokens that the greedy choice passes over; they change `greedy`, not the log-likelihood.
    """

    context: Ids
    continuation: Ids
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Generation:
    """Tokens to generate greedily behind a context.

    Attributes:
        context: what stands before; cut from the left so that context and new tokens fit the model.
        max_new_tokens: how many; fewer come where the model ends the text.
    """

    context: Ids
    max_new_tokens: int


@dataclass(frozen=True)
class LogLikelihood:
    """The answer to a `Request`.

    Attributes:
        sum: natural logarithm of the continuation's probability.
        tokens: in the continuation.
        greedy: whether every token of the continuation is the model's first choice.
    """

    sum: float
    tokens: int
    greedy: bool


@dataclass(frozen=True)
class Generated:
    """The answer to a `Generation`: the new tokens."""

    ids: Ids


@dataclass(frozen=True)
class Item:
    """A question, a passage, or a window of a document.

    Attributes:
        index: its place in the data; an item keeps it whatever the limit and the order of scoring.
        requests: what it asks; the answers come in the same order.
        gold: the right answer in the form of the record's "prediction"; None where there is none.
        facts: what else the protocol needs for the record (lengths of the candidates in bytes, words, …).
        data: the `data_hash` of the row or text that it was made from, whatever the tokenizer: results of two models
            are compared only where it is the same.
    """

    index: int
    requests: tuple[Request | Generation, ...]
    gold: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""


def data_hash(data: Any) -> str:
    """Return a hash of a row, a text or whatever JSON can hold."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Figure:
    """A number that a task reports, and the entries of its records that a metric computes it from.

    Attributes:
        name: in results.json and in `evaluation/results/references.py`: "acc_norm".
        metric: the module in `evaluation/metrics/`: "accuracy" compares predictions with references; "perplexity",
            "loss" and "bits_per_byte" take log-likelihoods in nats as predictions and counts (of tokens, words,
            passages or bytes) as references.
        prediction: the record's key for the metric's predictions.
        reference: the record's key for the metric's references.
    """

    name: str
    metric: str
    prediction: str
    reference: str = "gold"


class Task(ABC):
    """A task under one protocol.

    Attributes:
        name: "hellaswag".
        protocol: "harness".
        description: the exact text handling, in a sentence or two.
        source: where the protocol comes from.
        figures: what it reports, the first of which heads a table and a progress bar.
    """

    name: str
    protocol: str
    description: str
    source: str
    figures: ClassVar[tuple[Figure, ...]]

    @property
    def full_name(self) -> str:
        """Return task and protocol as they are asked for: "hellaswag:harness"."""
        return f"{self.name}:{self.protocol}"

    @abstractmethod
    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, all when None.

        Args:
            data_dir: a folder with the official files; None for the Hub.
            encoder: the model's.
            n_positions: the longest sequence that the model takes, in tokens.
            limit: how many items.

        Raises:
            InputError: the data is not there, or a line of it is not what the format says; or an item needs more
                positions than there are and may not be cut.
        """

    @abstractmethod
    def predict(self, item: Item, answers: Sequence[Any]) -> dict[str, Any]:
        """Return the item's record, ready for JSON: "index", "gold", "prediction", "log_likelihoods", and what the
        figures need.

        Args:
            item: as `items` gave it.
            answers: a `LogLikelihood` or `Generated` for each of its requests.
        """
