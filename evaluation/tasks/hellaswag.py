"""HellaSwag: which of four endings continues a description (Zellers et al. 2019), on its 10,042 validation items."""

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from evaluation.tasks.data_sources import RowTask
from evaluation.tasks.encoding import context_tokens, encode_jointly
from evaluation.tasks.task_types import Encoder, Item, LogLikelihood, Metric, Request, argmax, data_hash


class _HellaSwag(RowTask):
    name = "hellaswag"
    metrics: ClassVar = (
        Metric("acc_norm", "accuracy", "prediction"),
        Metric("acc", "accuracy", "prediction_by_sum"),
    )
    repository = "Rowan/hellaswag"
    split = "validation"
    file_names = ("hellaswag_val.jsonl", "hellaswag_val*.jsonl")
    fields: ClassVar = {
        "activity_label": str,
        "ctx_a": str,
        "ctx_b": str,
        "ctx": str,
        "endings": list,
        "label": (int, str),
    }
    unit = "tokens"  # acc_norm compares the mean log-likelihood per unit of the ending

    def _problem(self, row: dict[str, Any]) -> str | None:
        endings, label = row["endings"], str(row["label"])
        if len(endings) != 4 or not all(isinstance(ending, str) and ending.strip() for ending in endings):
            return f"not four endings: {endings!r:.60}"
        return None if label in ("0", "1", "2", "3") else f"the label is not 0, 1, 2 or 3: {label!r}"

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder, n_positions: int) -> Item:
        data = data_hash([str(row[field]) for field in self.fields])
        return Item(index, self._requests(row, encoder), int(row["label"]), extra=self._lengths(row), data=data)

    @abstractmethod
    def _requests(self, row: dict[str, Any], encoder: Encoder) -> tuple[Request, ...]: ...

    def _lengths(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Return the lengths of the endings by their unit; none if they are counted in tokens."""
        return {}

    def record(self, item: Item, scores: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the ending with the best mean log-likelihood, and the one with the best sum."""
        sums = [score.sum for score in scores]
        lengths = item.extra.get(self.unit) or [score.tokens for score in scores]
        return {
            "gold": item.gold,
            "prediction": argmax([total / length for total, length in zip(sums, lengths, strict=True)]),
            "prediction_by_sum": argmax(sums),
            "log_likelihoods": sums,
            self.unit: lengths,
        }


class HellaSwagCompletion(_HellaSwag):
    """The ending with the lowest mean loss per token."""

    protocol = "completion"
    description = (
        "The context as it is, then a space and the ending, tokenized separately; acc_norm takes the ending with the "
        "lowest mean loss per token, acc the one with the lowest sum."
    )
    source = "karpathy/build-nanogpt hellaswag.py; karpathy/llm.c dev/data/hellaswag.py"

    def _requests(self, row: dict[str, Any], encoder: Encoder) -> tuple[Request, ...]:
        context = context_tokens(encoder, encoder.encode(row["ctx"]))
        return tuple(Request(context, tuple(encoder.encode(f" {ending}"))) for ending in row["endings"])


class HellaSwagHarness(_HellaSwag):
    """The ending with the highest log-likelihood after the activity's label."""

    protocol = "harness"
    description = (
        '"ACTIVITY: ctx_a Ctx_b" without bracketed tags, then a space and the ending, tokenized as one text; acc takes '
        "the ending with the highest log-likelihood, acc_norm the highest per byte of the ending (the harness's own "
        "acc_norm is per character, which is the same for ASCII; its acc_bytes is per byte)."
    )
    source = "EleutherAI/lm-evaluation-harness, task hellaswag, 0-shot"
    unit = "bytes"

    def _requests(self, row: dict[str, Any], encoder: Encoder) -> tuple[Request, ...]:
        context = without_tags(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        return tuple(encode_jointly(encoder, context, f" {without_tags(ending)}") for ending in row["endings"])

    def _lengths(self, row: dict[str, Any]) -> dict[str, list[int]]:
        # At least 1: an ending may consist of tags only.
        return {"bytes": [max(1, len(without_tags(ending).encode())) for ending in row["endings"]]}


def without_tags(text: str) -> str:
    """Return a WikiHow text without its bracketed tags; "[title]" begins a new sentence."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
