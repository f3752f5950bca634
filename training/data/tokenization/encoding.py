"""Text to ids in worker processes: with tiktoken for GPT-2's pattern, with the `tokenizers` library for others.

tiktoken gets forms of the pattern that its regex engine matches fastest. The slow part is the look-ahead `\\s+(?!\\S)`,
which leaves the last character of a run of white space to the next word: the engine has to backtrack instead of running
an automaton. Text without two white-space characters in a row does not need the look-ahead; in other text, the same
cuts can be made beforehand.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken

from training.data.sources.pieces import SPACE

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""Pre-tokenization as in GPT-2's encoder.py."""

_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"""
_SAME_AS_GPT2 = _WORDS + r"|\s+$|\s+(?!\S)|\s"
_WITHOUT_LOOK_AHEAD = _WORDS + r"|\s+"

_RUN_OF_SPACE = re.compile(f"[{SPACE}]{{2}}")
_BEFORE_LAST_SPACE_OF_A_RUN = re.compile(f"(?<=[{SPACE}])(?=[{SPACE}][^{SPACE}])")


class BytePairEncoding:
    """Text to ids and back; can be pickled, and unpickled without a download. Arguments as of `Tokenizer`."""

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
        self._exact, self._without_look_ahead = (
            tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
            for pattern in (_SAME_AS_GPT2, _WITHOUT_LOOK_AHEAD)
        )
        self._special_tokens = special_tokens
        self._special_token = re.compile(f"({'|'.join(map(re.escape, special_tokens))})") if special_tokens else None

    def encode(self, text: str, *, split_special_tokens: bool = True) -> np.ndarray:
        """Return the ids of `text`, (tokens,), uint32; special tokens in it are plain text if they are split."""
        if not split_special_tokens and self._special_token and self._special_token.search(text):
            parts = self._special_token.split(text)  # every second one is a special token
            ids = [
                np.array([self._special_tokens[part]], dtype=np.uint32) if number % 2 else self.encode(part)
                for number, part in enumerate(parts)
            ]
            return np.concatenate(ids)
        try:
            return _ids(self._exact if _RUN_OF_SPACE.search(text) else self._without_look_ahead, text)
        except UnicodeEncodeError:  # a lone surrogate, which tiktoken's other methods replace by U+FFFD
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # the engine's stack overflows after some hundred thousand white-space characters
            parts = _BEFORE_LAST_SPACE_OF_A_RUN.split(text)
            return np.concatenate([_ids(self._without_look_ahead, part) for part in parts])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the exact bytes of `ids`."""
        return self._exact.decode_bytes(ids)


class LibraryEncoding:
    """Text to ids with a backend of the `tokenizers` library, given as its JSON; can be pickled."""

    def __init__(self, backend: str) -> None:
        self._json = backend

    def encode(self, text: str, *, split_special_tokens: bool = True) -> np.ndarray:
        """Return the ids of `text`, (tokens,), uint32."""
        backend = self._backend
        backend.encode_special_tokens = split_special_tokens
        return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def __getstate__(self) -> dict[str, Any]:
        return {"_json": self._json}

    @functools.cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self._json)
        backend.no_padding()
        backend.no_truncation()
        return backend


Encoding = BytePairEncoding | LibraryEncoding


@dataclass(frozen=True)
class EncodePieces:
    """Pieces of documents -> their ids as one array, the same ids before each document; picklable."""

    bpe: Encoding
    document_start: tuple[int, ...]
    dtype: str
    split_special_tokens: bool = True

    def __call__(self, pieces: Sequence[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of the pieces, (tokens,), and how many each has, (pieces,).

        Args:
            pieces: text, and whether a document begins with it.
        """
        start = np.array(self.document_start, dtype=self.dtype)
        parts: list[np.ndarray] = []
        for text, starts in pieces:
            ids = self.bpe.encode(text, split_special_tokens=self.split_special_tokens)
            parts.append(np.concatenate([start, ids]) if starts else ids)
        ids = np.concatenate(parts or [start[:0]], dtype=self.dtype, casting="same_kind")
        return ids, np.array(list(map(len, parts)), dtype=np.int64)


def _ids(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    # An array avoids one Python object per id.
    return encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
