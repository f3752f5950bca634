"""Train a tokenizer on the training part of a corpus."""

import itertools
import re
from collections.abc import Callable, Iterator

from common.cli_errors import InputError
from training.data.sources.base import Corpus
from training.data.tokenization.tokenizer import Tokenizer, train_bpe

_MAX_CHARACTERS = 64_000_000
_RESERVED_CHARACTERS_PER_TOKEN = 6
_WORD_END = re.compile(r"\S(?=\s)")


def train_tokenizer(corpus: Corpus, vocab_size: int, *, val_tokens: int, report: Callable[[str], None]) -> Tokenizer:
    """Return a BPE trained on at most 64 million characters after the validation part.

    Where the validation part ends is known only once there is a tokenizer. So a number of characters is reserved for
    it, and doubled if it is too small.
    """
    reserved = _RESERVED_CHARACTERS_PER_TOKEN * val_tokens
    while True:
        report(f"training a vocabulary of {vocab_size:,} tokens on {corpus.name} …")
        texts = _training_texts(corpus, reserved)
        first = next(texts, None)
        if first is None:
            raise InputError(
                f"nothing is left to train a tokenizer on: the corpus has no more than the {reserved:,} characters "
                f"reserved for val_tokens={val_tokens:,}; give a larger corpus, or a smaller --val_tokens"
            )
        tokenizer = train_bpe(itertools.chain([first], texts), vocab_size)
        tokens = 0
        for text, _, starts in _split(corpus, reserved):
            if not text:
                break
            tokens += starts + len(tokenizer.encode(text))
            if tokens >= val_tokens:
                return tokenizer
        reserved *= 2


def _training_texts(corpus: Corpus, reserved: int) -> Iterator[str]:
    """Yield the texts after the reserved characters, truncated to the maximum number of characters."""
    remaining = _MAX_CHARACTERS
    for _, text, _ in _split(corpus, reserved):
        if remaining <= 0:
            return
        if text:
            yield text[:remaining]
        remaining -= len(text)


def _split(corpus: Corpus, reserved: int) -> Iterator[tuple[str, str, bool]]:
    """Yield each piece as (its part of the first `reserved` characters, the rest), and whether a document begins.

    The cut is after a word, which is between tokens.
    """
    for piece in corpus.read():
        end = 0
        if reserved > 0:
            word_end = _WORD_END.search(piece.text, reserved - 1)
            end = word_end.end() if word_end else len(piece.text)
            reserved -= end
        yield piece.text[:end], piece.text[end:], piece.starts
