"""Where a long text can be cut, so that no document has to be in memory or be encoded as a whole.

GPT-2's pre-tokenization never joins a character to a space after it, nor a letter to punctuation after it. So the ids
of the pieces, one after the other, are those of the text. Where possible, a cut is in front of a space between two
words, where other tokenizers can be cut too. Only `MAX_PIECE_CHARACTERS` without any such position are cut anywhere.
"""

import re
from collections.abc import Iterator

PIECE_CHARACTERS = 1 << 16
MAX_PIECE_CHARACTERS = 1 << 22

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's; Python's \s has four more
LOOK_AHEAD = 1024  # characters that are searched for a boundary between two words

_BETWEEN_WORDS = re.compile(r"[^\W\d_](?= [^\W\d_])")
_BETWEEN_TOKENS = re.compile(rf"[^{SPACE}](?=[{SPACE}])|[^\W\d_](?=[.,;:!?\"()、。，！？])")


def piece_end(text: str, start: int, *, complete: bool) -> int | None:
    """Return where the piece that begins at `start` ends; None where that depends on text after an incomplete one."""
    target = start + PIECE_CHARACTERS
    if len(text) <= target + LOOK_AHEAD:
        return len(text) if complete else None
    match = _BETWEEN_WORDS.search(text, target - 1, target + LOOK_AHEAD)
    match = match or _BETWEEN_TOKENS.search(text, target - 1, start + MAX_PIECE_CHARACTERS)
    if match is not None:
        return match.end()
    if len(text) - start >= MAX_PIECE_CHARACTERS:
        return start + MAX_PIECE_CHARACTERS
    return len(text) if complete else None


def pieces_of(text: str) -> Iterator[str]:
    """Yield the pieces of a complete text."""
    start = 0
    while start < len(text):
        end = piece_end(text, start, complete=True)
        assert end is not None  # the text is complete
        yield text[start:end]
        start = end


def is_between_words(left: str, right: str) -> bool:
    """Return whether the cut between two pieces is in front of a space between two words."""
    return _BETWEEN_WORDS.match(left[-1:] + right[:2]) is not None
