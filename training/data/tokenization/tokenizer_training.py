"""A tokenizer for a corpus, trained on what validation will not see."""

import re
from collections.abc import Callable, Iterable, Iterator

from common.cli_errors import InputError
from training.data.sources.base import Corpus
from training.data.tokenization.tokenizer import Tokenizer, train_bpe

TOKENIZER_TRAINING_CHARACTERS = 64_000_000
_RESERVED_CHARACTERS_PER_TOKEN = 6


def train_tokenizer(
    source: Corpus, vocab_size: int, *, val_tokens: int, report: Callable[[str], None] = print
) -> Tokenizer:
    """Return a BPE trained on what follows the validation part, on at most 64 million characters of it.

    How far `val_tokens` tokens reach is known only when the tokenizer is: so a beginning is set aside by characters,
    and twice as much when it turns out too short.

    Raises:
        InputError: the corpus is too small for that.
    """
    reserved = _RESERVED_CHARACTERS_PER_TOKEN * val_tokens
    while True:
        report(f"training a vocabulary of {vocab_size:,} tokens on {source.name} …")
        rest = (text for _, text in _set_aside(source.documents(), reserved) if text)
        first = next(rest, None)
        if first is None:
            raise InputError(
                f"expected a corpus of more than the {reserved:,} characters that are set aside for "
                f"val_tokens={val_tokens:,}, found nothing behind them to train a tokenizer on; "
                "give a larger corpus, or a smaller --val_tokens"
            )
        tokenizer = train_bpe(_limited(first, rest, TOKENIZER_TRAINING_CHARACTERS), vocab_size)
        tokens = 0
        for text, _ in _set_aside(source.documents(), reserved):
            if not text or tokens >= val_tokens:
                break
            tokens += 1 + len(tokenizer.encode(text))
        if tokens >= val_tokens:
            return tokenizer
        reserved *= 2


def _set_aside(documents: Iterable[str], characters: int) -> Iterator[tuple[str, str]]:
    """Yield each document as (what belongs to the first `characters` of the corpus, the rest).

    The cut is moved on to where a word ends, so that it is also a cut between tokens.
    """
    for document in documents:
        end = 0
        if characters > 0:
            word_end = re.compile(r"\S(?=\s)").search(document, characters - 1)
            end = word_end.end() if word_end else len(document)
            characters -= end
        yield document[:end], document[end:]


def _limited(first: str, rest: Iterable[str], characters: int) -> Iterator[str]:
    yield first[:characters]
    characters -= len(first)
    for text in rest:
        if characters <= 0:
            return
        yield text[:characters]
        characters -= len(text)
