"""WikiText-2: the perplexity of Wikipedia articles (Merity et al. 2016), on the test set.

The test set is one text. A window slides over it, and each token is scored once, after at least half a window of
context (at the beginning of the text: after all there is).
"""

import re
from pathlib import Path
from typing import ClassVar

from evaluation.tasks.data_sources import find_file, hub_rows, read_lines, unusable
from evaluation.tasks.detokenizers import detokenize_wikitext
from evaluation.tasks.task_types import Encoder, Ids, Item, Metric, Request, TextTask, data_hash


class WikiText2(TextTask):
    """The perplexity of the detokenized text."""

    name = "wikitext2"
    protocol = "paper"
    description = (
        "The text without traces of tokenization (@-@, spaced punctuation, headings); a window of n_positions tokens "
        "with a stride of half of them. Perplexity per token of the model, and per word of the tokenized text, where "
        "the end of a line counts as a word."
    )
    source = "GPT-2 paper, section 3.1 (stride and detokenizer are ours); huggingface.co/docs/transformers/perplexity"
    metrics: ClassVar = (
        Metric("word_ppl", "perplexity", "log_likelihood", "words"),
        Metric("token_ppl", "perplexity", "log_likelihood", "tokens"),
    )

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """See `Task.items`."""
        lines = read_test_lines(data_dir)
        ids, data = tuple(encoder.encode(self._text("".join(lines)))), data_hash(lines)
        words = [len(line.split()) + 1 for line in lines]
        items, line = [], 0
        for index, request in enumerate(sliding_windows(ids, encoder.end_of_text_id, n_positions)[:limit]):
            # A line's words count in the window that scores its end: a line feed is never part of another character.
            ends = encoder.decode_bytes(request.continuation).count(b"\n")
            items.append(Item(index, (request,), extra={"words": sum(words[line : line + ends])}, data=data))
            line += ends
        return items

    def _text(self, text: str) -> str:
        return detokenize_wikitext(text)


class WikiText2Raw(WikiText2):
    """The perplexity of the text as the data set has it."""

    protocol = "raw"
    description = (
        "The text as it is, including spaced punctuation and @-@; a window of n_positions tokens with a stride of half "
        "of them. Perplexity per token of the model, and per word, where the end of a line counts as a word."
    )
    source = "huggingface.co/docs/transformers/perplexity"

    def _text(self, text: str) -> str:
        return text


def sliding_windows(ids: Ids, first_context: int, n_positions: int) -> list[Request]:
    """Return requests that score each of `ids` once, in windows of `n_positions` tokens, half of them overlapping."""
    stride = max(1, n_positions // 2)
    starts = range(n_positions, len(ids), stride)
    rest = [Request(ids[start + stride - n_positions : start], ids[start : start + stride]) for start in starts]
    return [Request((first_context,), ids[:n_positions]), *rest]


def read_test_lines(data_dir: Path | None) -> list[str]:
    """Return the lines of the test set with their ends, as in the official file."""
    if data_dir is None:
        # The Hub stores an empty line as an empty text; in the file it is a space.
        rows = hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
        return [row["text"] or " \n" for row in rows]
    path = find_file(data_dir, ("wiki.test.raw", "wiki.test.tokens"))
    lines = read_lines(path)
    if not lines[-1].endswith("\n"):
        raise unusable(path, len(lines), f"the last line is incomplete: {lines[-1][-30:]!r}")
    if not any(re.fullmatch(r" = [^=].* = \n", line) for line in lines):
        raise unusable(path, 1, "the text has no article heading (' = Title = ')")
    return lines
