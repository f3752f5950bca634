"""WikiText-2: the perplexity of Wikipedia articles (Merity et al. 2016), on the test set.

The whole test set is one text. A window slides over it, and every token is scored once, behind at least half a window
of context where there is so much.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.data_sources import find_file, hub_rows, not_usable, read_lines
from evaluation.tasks.detokenizers import detokenise_wikitext
from evaluation.tasks.task_types import Encoder, Figure, Ids, Item, LogLikelihood, Request, Task, data_hash

_FILES = ("wiki.test.raw", "wiki.test.tokens")


class WikiText2(Task):
    """The perplexity of the text as people write it."""

    name = "wikitext2"
    protocol = "paper"
    description = (
        "Tokenisation removed (@-@, spaced punctuation, headings); a window of n_positions tokens that moves by half "
        "of them. Perplexity per token of the model, and per word of the tokenised text, where the end of a line is a "
        "word."
    )
    source = "GPT-2 paper, section 3.1 (stride and de-tokeniser are ours); huggingface.co/docs/transformers/perplexity"
    figures: ClassVar = (
        Figure("word_ppl", "perplexity", "log_likelihood", "words"),
        Figure("token_ppl", "perplexity", "log_likelihood", "tokens"),
    )

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, as `Task.items` says."""
        lines = read_test_lines(data_dir)
        ids = tuple(encoder.encode(self._text(lines)))
        data = data_hash(lines)
        words = [len(line.split()) + 1 for line in lines]
        items = []
        line = 0
        for index, request in enumerate(sliding_windows(ids, encoder.end_of_text_id, n_positions)):
            if index == limit:
                break
            # A line's words count where its end is scored: a line feed is never part of another character.
            ends = encoder.decode_bytes(request.continuation).count(b"\n")
            facts = {"words": sum(words[line : line + ends])}
            line += ends
            items.append(Item(index, (request,), facts=facts, data=data))
        return items

    def predict(self, item: Item, answers: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        answer = answers[0]
        return {
            "index": item.index,
            "log_likelihood": answer.sum,
            "tokens": answer.tokens,
            "words": item.facts["words"],
        }

    def _text(self, lines: Sequence[str]) -> str:
        return detokenise_wikitext("".join(lines))


class WikiText2Raw(WikiText2):
    """The perplexity of the text as the data set has it."""

    protocol = "raw"
    description = (
        "The text as it stands, spaced punctuation and @-@ included; a window of n_positions tokens that moves by half "
        "of them. Perplexity per token of the model, and per word, where the end of a line is a word."
    )
    source = "huggingface.co/docs/transformers/perplexity"

    def _text(self, lines: Sequence[str]) -> str:
        return "".join(lines)


def sliding_windows(ids: Ids, before: int, n_positions: int) -> list[Request]:
    """Return requests that score each of `ids` once, in windows of `n_positions` tokens that move by half of them.

    Args:
        ids: the text.
        before: the token that the first one follows.
        n_positions: the longest sequence that the model takes.
    """
    stride = max(1, n_positions // 2)
    requests = [Request((before,), ids[:n_positions])]
    for start in range(n_positions, len(ids), stride):
        continuation = ids[start : start + stride]
        requests.append(Request(ids[start - (n_positions - stride) : start], continuation))
    return requests


def read_test_lines(data_dir: Path | None) -> list[str]:
    """Return the lines of the test set as its file has them, each with its end.

    Raises:
        InputError: the file ends inside a line, or holds other text.
    """
    if data_dir is None:
        # The Hub keeps an empty line as an empty text; in the file it is a space.
        rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return [row["text"] or " \n" for row in rows]
    path = find_file(data_dir, _FILES)
    lines = read_lines(path)
    if not lines[-1].endswith("\n"):
        raise not_usable(path, len(lines), "the end of a line", repr(lines[-1][-30:]))
    if not any(re.fullmatch(r" = [^=].* = \n", line) for line in lines):
        raise not_usable(path, 1, "an article's heading (' = Title = ') somewhere", "none")
    return lines
