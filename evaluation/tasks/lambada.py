"""LAMBADA: the last word of a passage (Paperno et al. 2016), on the 5,153 test passages as OpenAI detokenised them.

The paper "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) does not say how its figures come
about; the protocols here are those that are in use, and each gives another figure for the same model.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.context_split import context_of, split_as_whole
from evaluation.tasks.data_sources import find_file, hub_rows, json_rows, not_usable
from evaluation.tasks.stop_words import STOP_WORDS
from evaluation.tasks.task_types import (
    Encoder,
    Figure,
    Generated,
    Generation,
    Item,
    LogLikelihood,
    Request,
    Task,
    data_hash,
)

_FILE = "lambada_test.jsonl"
_NEW_TOKENS = 8  # the longest target has fewer in GPT-2's vocabulary
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


class _Lambada(Task):
    name = "lambada"

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, as `Task.items` says."""
        texts = enumerate(read_texts(data_dir, limit))
        return [replace(self._item(index, text, encoder), data=data_hash(text)) for index, text in texts]

    @abstractmethod
    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        """Return the item of a passage."""

    def predict(self, item: Item, answers: Sequence[Any]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        answer: LogLikelihood = answers[0]
        return {
            "index": item.index,
            "gold": True,
            "prediction": answer.greedy,
            "log_likelihood": answer.sum,
            "words": 1,
            "target": item.gold,
        }


class LambadaHarness(_Lambada):
    """All tokens of the last word, each the model's first choice."""

    protocol = "harness"
    description = (
        "The last word is what follows the last space; passage and word are tokenised as one text. Right when each of "
        "the word's tokens is the model's first choice; perplexity of whole words."
    )
    source = "EleutherAI/lm-evaluation-harness, task lambada_openai"
    figures: ClassVar = (
        Figure("acc", "accuracy", "prediction"),
        Figure("ppl", "perplexity", "log_likelihood", "words"),
    )

    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        context, word = split_last_word(text)
        return Item(index, (Request(*split_as_whole(encoder, context, f" {word}")),), gold=word)


class LambadaLastToken(_Lambada):
    """Only the last token, behind all others."""

    protocol = "last_token"
    description = (
        "The passage is tokenised as it stands; right when its last token is the model's first choice behind all the "
        "others, which gives away the beginning of a word of several tokens."
    )
    source = "openai/gpt-2 issue 131"
    figures: ClassVar = (
        Figure("acc", "accuracy", "prediction"),
        Figure("ppl", "perplexity", "log_likelihood", "words"),
    )

    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        ids = encoder.encode(text.rstrip())
        context = context_of(encoder, ids[:-1])
        return Item(index, (Request(context, (ids[-1],)),), gold=encoder.decode(ids[-1:]))


class LambadaWord(_Lambada):
    """The word that the model writes."""

    protocol = "word"
    description = (
        f"The model continues the passage greedily by {_NEW_TOKENS} tokens (or one more than the target has); right "
        "when the first word it writes (letters and digits, with apostrophes and hyphens inside) is the target, in the "
        "same case."
    )
    source = "from-scratch projects that generate and compare"
    figures: ClassVar = (Figure("acc", "accuracy", "prediction"),)

    def _item(self, index: int, text: str, encoder: Encoder) -> Item:
        context, word = split_at_last_letters(text)
        ids = context_of(encoder, encoder.encode(context))
        new_tokens = max(_NEW_TOKENS, len(encoder.encode(f" {word}")) + 1)  # one more shows that the word ends
        return Item(index, (Generation(ids, new_tokens),), gold=word, facts={"decode": encoder.decode})

    def predict(self, item: Item, answers: Sequence[Generated]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        text = item.facts["decode"](answers[0].ids)
        return {
            "index": item.index,
            "gold": item.gold,
            "prediction": first_word(text),
            "generated": text,
        }


class LambadaStopWordFilter(LambadaHarness):
    """All tokens of the last word, each the first choice among what is no stop word."""

    protocol = "stop_word_filter"
    description = (
        'As harness, but the model\'s choices pass over tokens that are a stop word by themselves (" the", " and", …): '
        "a passage does not end in one. The perplexity is that of harness."
    )
    source = "GPT-2 paper, section 3.3, which does not list its stop words; the list here is Snowball's for English"

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, as `Task.items` says."""
        excluded = stop_tokens(encoder)
        plain = super().items(data_dir, encoder, n_positions, limit)
        return [
            replace(
                item, requests=tuple(replace(r, excluded=excluded) for r in item.requests if isinstance(r, Request))
            )
            for item in plain
        ]


def read_texts(data_dir: Path | None, limit: int | None) -> list[str]:
    """Return passages.

    Raises:
        InputError: a passage has no last word behind others.
    """
    if data_dir is not None:
        rows = json_rows(find_file(data_dir, [_FILE]), {"text": str}, limit, _check)
    else:
        rows = hub_rows("EleutherAI/lambada_openai", "default", "test", limit)
        for number, row in enumerate(rows, 1):
            _check(row, "EleutherAI/lambada_openai", number)
    return [str(row["text"]) for row in rows]


def _check(row: dict[str, Any], where: Path | str, number: int) -> None:
    context, word = split_last_word(row["text"])
    if not context.strip() or not _WORD.search(word):
        raise not_usable(where, number, "a passage and its last word", repr(row["text"][:40]))


def split_last_word(text: str) -> tuple[str, str]:
    """Return what stands before the last space, and behind it."""
    context, _, word = text.rpartition(" ")
    return context, word


def split_at_last_letters(text: str) -> tuple[str, str]:
    """Return what stands before the last word, and the word without the punctuation around it.

    Unlike what follows the last space, the word never holds a quotation mark, a line's end or the word before it.
    """
    *_, last = _WORD.finditer(text)
    return text[: last.start()].rstrip(" "), last[0]


def first_word(text: str) -> str:
    """Return the first word of a text, without the punctuation around it; empty when there is none."""
    match = _WORD.search(text)
    return match[0] if match else ""


def stop_tokens(encoder: Encoder) -> frozenset[int]:
    """Return the tokens that are a stop word with a space before it, in lower case or capitalised."""
    spelt = [encoder.encode(f" {form}") for word in STOP_WORDS for form in (word, word.capitalize())]
    return frozenset(ids[0] for ids in spelt if len(ids) == 1)
