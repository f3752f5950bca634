"""LAMBADA: the last word of a passage (Paperno et al. 2016), on the 5,153 test passages as OpenAI detokenized them.

"Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) does not describe its protocol. The
protocols here are the ones in use; each gives the same model another accuracy.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.data_sources import RowSource
from evaluation.tasks.encoding import context_tokens, encode_jointly
from evaluation.tasks.stop_words import STOP_WORDS
from evaluation.tasks.task_types import (
    Encoder,
    Generated,
    Generation,
    Item,
    LogLikelihood,
    Metric,
    Request,
    Task,
    data_hash,
)

_NEW_TOKENS = 8  # the longest target has fewer in GPT-2's vocabulary
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def split_last_word(text: str) -> tuple[str, str]:
    """Return what precedes and what follows the last space."""
    context, _, word = text.rpartition(" ")
    return context, word


def _problem(row: dict[str, Any]) -> str | None:
    context, word = split_last_word(row["text"])
    return None if context.strip() and _WORD.search(word) else f"not a passage and a last word: {row['text'][:40]!r}"


_ROWS = RowSource(
    repository="EleutherAI/lambada_openai",
    config="default",
    split="test",
    file_names=("lambada_test.jsonl",),
    fields={"text": str},
    problem=_problem,
)


class _Lambada(Task):
    """The last word, right if each of its scored tokens is the model's most likely one."""

    name = "lambada"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("acc", "accuracy", "prediction"),
        Metric("ppl", "perplexity", "log_likelihood", "words"),
    )

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        texts = [row["text"] for row in _ROWS.read(data_dir, limit)]
        return [self._item(index, text, encoder) for index, text in enumerate(texts)]

    @abstractmethod
    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        """Return the item of a passage."""

    def record(self, item: Item, scores: Sequence[Any]) -> dict[str, Any]:
        score: LogLikelihood = scores[0]
        return {
            "index": item.index,
            "gold": True,
            "prediction": score.greedy,
            "log_likelihood": score.sum,
            "words": 1,
            "target": item.gold,
        }


class LambadaHarness(_Lambada):
    """All tokens of the last word."""

    protocol = "harness"
    description = (
        "The last word is what follows the last space; passage and word are tokenized as one text. Right if each of "
        "the word's tokens is the model's most likely one; perplexity per word."
    )
    source = "EleutherAI/lm-evaluation-harness, task lambada_openai"

    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        context, word = split_last_word(text)
        return Item(index, (encode_jointly(encoder, context, f" {word}"),), gold=word, data=data_hash(text))


class LambadaLastToken(_Lambada):
    """Only the last token."""

    protocol = "last_token"
    description = (
        "The passage is tokenized as it is; right if its last token is the model's most likely one after all the "
        "others, which include the beginning of a word of several tokens."
    )
    source = "openai/gpt-2 issue 131"

    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        ids = encoder.encode(text.rstrip())
        request = Request(context_tokens(encoder, ids[:-1]), (ids[-1],))
        return Item(index, (request,), gold=encoder.decode(ids[-1:]), data=data_hash(text))


class LambadaWord(_Lambada):
    """The first word that the model generates."""

    protocol = "word"
    description = (
        f"The model continues the passage greedily by {_NEW_TOKENS} tokens (or one more than the target has); right if "
        "the first generated word (letters and digits, with apostrophes and hyphens inside) is the target, in the same "
        "case."
    )
    source = "from-scratch projects that generate and compare"
    metrics: ClassVar = (Metric("acc", "accuracy", "prediction"),)

    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        # Unlike what follows the last space, this word never holds a quotation mark or a line break.
        *_, target = _WORD.finditer(text)
        ids = encoder.encode(text[: target.start()].rstrip(" "))
        new_tokens = max(_NEW_TOKENS, len(encoder.encode(f" {target[0]}")) + 1)  # one more shows that the word ends
        return Item(
            index,
            (Generation(context_tokens(encoder, ids), new_tokens),),
            gold=target[0],
            extra={"decode": encoder.decode},
            data=data_hash(text),
        )

    def record(self, item: Item, scores: Sequence[Generated]) -> dict[str, Any]:
        """See `Task.record`."""
        text = item.extra["decode"](scores[0].ids)
        word = _WORD.search(text)
        return {
            "index": item.index,
            "gold": item.gold,
            "prediction": word[0] if word else "",
            "generated": text,
        }


class LambadaStopWordFilter(LambadaHarness):
    """All tokens of the last word, where stop words are no candidates."""

    protocol = "stop_word_filter"
    description = (
        'As harness, but the model may not choose a token that is a stop word by itself (" the", " and", …), because a '
        "passage does not end in one. The perplexity is that of harness."
    )
    source = "GPT-2 paper, section 3.3, which does not list its stop words; this list is Snowball's for English"

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """See `Task.items`."""
        excluded = stop_tokens(encoder)
        items = super().items(data_dir, encoder, n_positions, limit)
        return [
            replace(item, requests=tuple(Request(r.context, r.continuation, excluded) for r in item.requests))  # type: ignore[union-attr]
            for item in items
        ]


def stop_tokens(encoder: Encoder) -> frozenset[int]:
    """Return the tokens that are a stop word after a space, in lower case or capitalized."""
    encoded = [encoder.encode(f" {form}") for word in STOP_WORDS for form in (word, word.capitalize())]
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)
