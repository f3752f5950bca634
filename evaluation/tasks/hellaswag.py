"""HellaSwag: which of four endings continues a description (Zellers et al. 2019), on its 10,042 validation items."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.context_split import context_of, split_as_whole
from evaluation.tasks.data_sources import find_file, hub_rows, json_rows, not_usable
from evaluation.tasks.task_types import Encoder, Figure, Item, LogLikelihood, Request, Task, data_hash

_FILE = "hellaswag_val.jsonl"
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "activity_label": str,
    "ctx_a": str,
    "ctx_b": str,
    "ctx": str,
    "endings": list,
    "label": (int, str),
}


class _HellaSwag(Task):
    name = "hellaswag"
    figures: ClassVar = (
        Figure("acc_norm", "accuracy", "prediction"),
        Figure("acc", "accuracy", "prediction_by_sum"),
    )

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, as `Task.items` says."""
        rows = enumerate(read_rows(data_dir, limit))
        return [
            replace(self._item(index, row, encoder), data=data_hash([str(row[key]) for key in _FIELDS]))
            for index, row in rows
        ]

    @abstractmethod
    def _item(self, index: int, row: dict[str, Any], encoder: Encoder) -> Item:
        """Return the item of a row."""


class HellaSwagCompletion(_HellaSwag):
    """The endings by the mean loss of their tokens."""

    protocol = "completion"
    description = (
        "Context as it stands, then a space and the ending, tokenised apart; acc_norm takes the ending with the lowest "
        "mean loss over its tokens, acc the one with the lowest sum."
    )
    source = "karpathy/build-nanogpt hellaswag.py; karpathy/llm.c dev/data/hellaswag.py"

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder) -> Item:
        context = context_of(encoder, encoder.encode(row["ctx"]))
        requests = tuple(Request(context, tuple(encoder.encode(f" {ending}"))) for ending in row["endings"])
        return Item(index, requests, gold=int(row["label"]))

    def predict(self, item: Item, answers: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        sums = [answer.sum for answer in answers]
        means = [answer.sum / answer.tokens for answer in answers]
        return {
            "index": item.index,
            "gold": item.gold,
            "prediction": first_largest(means),
            "prediction_by_sum": first_largest(sums),
            "log_likelihoods": sums,
            "tokens": [answer.tokens for answer in answers],
        }


class HellaSwagHarness(_HellaSwag):
    """The endings by their log-likelihood, behind the activity's label."""

    protocol = "harness"
    description = (
        '"ACTIVITY: ctx_a Ctx_b", bracketed tags removed, then a space and the ending, tokenised as one text; acc '
        "takes the ending with the highest log-likelihood, acc_norm the highest per byte of the ending (the harness's "
        "own acc_norm: per character, the same for ASCII; its acc_bytes: per byte)."
    )
    source = "EleutherAI/lm-evaluation-harness, task hellaswag, 0-shot"

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder) -> Item:
        query = without_tags(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        endings = [without_tags(ending) for ending in row["endings"]]
        requests = tuple(Request(*split_as_whole(encoder, query, f" {ending}")) for ending in endings)
        # An ending of tags alone has no bytes; it cannot be right.
        sizes = [max(1, len(ending.encode())) for ending in endings]
        facts = {"bytes": sizes, "characters": [max(1, len(ending)) for ending in endings]}
        return Item(index, requests, gold=int(row["label"]), facts=facts)

    def predict(self, item: Item, answers: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        sums = [answer.sum for answer in answers]
        per_byte, per_character = (
            [total / size for total, size in zip(sums, item.facts[unit], strict=True)]
            for unit in ("bytes", "characters")
        )
        return {
            "index": item.index,
            "gold": item.gold,
            "prediction": first_largest(per_byte),
            "prediction_by_sum": first_largest(sums),
            # What the harness's own acc_norm divides by; another choice only where endings are not all ASCII.
            "prediction_by_characters": first_largest(per_character),
            "log_likelihoods": sums,
            "bytes": item.facts["bytes"],
        }


def read_rows(data_dir: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """Return rows in the official form.

    Raises:
        InputError: a row is not four endings, one of which is right.
    """
    if data_dir is not None:
        return json_rows(find_file(data_dir, [_FILE, "hellaswag_val*.jsonl"]), _FIELDS, limit, _check)
    rows = hub_rows("Rowan/hellaswag", "default", "validation", limit)
    for number, row in enumerate(rows, 1):
        _check(row, "Rowan/hellaswag", number)
    return rows


def _check(row: dict[str, Any], where: Path | str, number: int) -> None:
    endings, label = row["endings"], str(row["label"])
    if len(endings) != 4 or not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise not_usable(where, number, "four endings", f"{endings!r}"[:60])
    if label not in ("0", "1", "2", "3"):
        raise not_usable(where, number, "a label from 0 to 3", repr(row["label"]))


def without_tags(text: str) -> str:
    """Return a text of WikiHow without its bracketed tags, of which a title begins a sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def first_largest(values: Sequence[float]) -> int:
    """Return the place of the largest value, the first of several."""
    return max(range(len(values)), key=values.__getitem__)
