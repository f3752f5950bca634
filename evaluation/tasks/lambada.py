"""LAMBADA: the last word of a passage (Paperno et al. 2016), on the 5,153 test passages as OpenAI detokenized them.

"Language Models are Unsupervised Multitask Learners" (Radford et al. 2019) does not describe its protocol. The
protocols here are the ones in use; each gives the same model another accuracy.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from evaluation.tasks.data_sources import RowTask
from evaluation.tasks.encoding import context_tokens, encode_jointly
from evaluation.tasks.task_types import Encoder, Generated, Generation, Item, LogLikelihood, Metric, Request, data_hash

_NEW_TOKENS = 8  # the longest target has fewer in GPT-2's vocabulary
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_STOP_WORDS = frozenset(  # the function words of the Snowball stemmer's list (snowballstem.org)
    """
    i me my myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves what which who whom this that these those am is are
    was were be been being have has had having do does did doing would should could ought a an the and but if or
    because as until while of at by for with about against between into through during before after above below
    to from up down in out on off over under again further then once here there when where why how all any both
    each few more most other some such no nor not only own same so than too very can will just
    """.split()  # noqa: SIM905 - a list would take a line per word
)


class _Lambada(RowTask):
    """The last word, right if each of its scored tokens is the model's most likely one."""

    name = "lambada"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("acc", "accuracy", "prediction"),
        Metric("ppl", "perplexity", "log_likelihood", "words"),
    )
    repository = "EleutherAI/lambada_openai"
    split = "test"
    file_names = ("lambada_test.jsonl",)
    fields: ClassVar = {"text": str}

    def _problem(self, row: dict[str, Any]) -> str | None:
        context, _, word = row["text"].rpartition(" ")
        if context.strip() and _WORD.search(word):
            return None
        return f"not a passage and a last word: {row['text'][:40]!r}"

    def record(self, item: Item, scores: Sequence[Any]) -> dict[str, Any]:
        """Return whether the word is the model's choice, and its log-likelihood in nats."""
        score: LogLikelihood = scores[0]
        found = {"gold": True, "prediction": score.greedy, "log_likelihood": score.sum}
        return {**found, "words": 1, "target": item.gold}


class LambadaHarness(_Lambada):
    """All tokens of the last word."""

    protocol = "harness"
    description = (
        "The last word is what follows the last space; passage and word are tokenized as one text. Right if each of "
        "the word's tokens is the model's most likely one; perplexity per word."
    )
    source = "EleutherAI/lm-evaluation-harness, task lambada_openai"

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder, n_positions: int) -> Item:
        context, _, word = row["text"].rpartition(" ")
        return Item(index, (self._request(encoder, context, word),), gold=word, data=data_hash(row["text"]))

    def _request(self, encoder: Encoder, context: str, word: str) -> Request:
        return encode_jointly(encoder, context, f" {word}")


class LambadaLastToken(_Lambada):
    """Only the last token."""

    protocol = "last_token"
    description = (
        "The passage is tokenized as it is; right if its last token is the model's most likely one after all the "
        "others, which include the beginning of a word of several tokens."
    )
    source = "openai/gpt-2 issue 131"

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder, n_positions: int) -> Item:
        *context, last = encoder.encode(row["text"].rstrip())
        request = Request(context_tokens(encoder, context), (last,))
        return Item(index, (request,), gold=encoder.decode([last]), data=data_hash(row["text"]))


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

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder, n_positions: int) -> Item:
        text = row["text"]
        # Unlike what follows the last space, this word never holds a quotation mark or a line break.
        *_, target = _WORD.finditer(text)
        context = context_tokens(encoder, encoder.encode(text[: target.start()].rstrip(" ")))
        new_tokens = max(_NEW_TOKENS, len(encoder.encode(f" {target[0]}")) + 1)  # one more shows that the word ends
        request = Generation(context, new_tokens)
        return Item(index, (request,), gold=target[0], extra={"decode": encoder.decode}, data=data_hash(text))

    def record(self, item: Item, scores: Sequence[Generated]) -> dict[str, Any]:
        """Return the first word of the generated text, and the text."""
        text = item.extra["decode"](scores[0].ids)
        word = _WORD.search(text)
        return {"gold": item.gold, "prediction": word[0] if word else "", "generated": text}


class LambadaStopWordFilter(LambadaHarness):
    """All tokens of the last word, where stop words are no candidates."""

    protocol = "stop_word_filter"
    description = (
        'As harness, but the model may not choose a token that is a stop word by itself (" the", " and", …), because a '
        "passage does not end in one. The perplexity is that of harness."
    )
    source = "GPT-2 paper, section 3.3, which does not list its stop words; this list is Snowball's for English"

    def _request(self, encoder: Encoder, context: str, word: str) -> Request:
        return replace(super()._request(encoder, context, word), excluded=stop_tokens(encoder))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1)
def stop_tokens(encoder: Encoder) -> frozenset[int]:
    """Return the tokens that are a stop word after a space, in lower case or capitalized."""
    encoded = [encoder.encode(f" {form}") for word in _STOP_WORDS for form in (word, word.capitalize())]
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)
