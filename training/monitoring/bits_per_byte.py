"""Bits per byte, which can be compared across tokenizers, of a model and of gzip on the same text."""

import gzip
import math
from dataclasses import dataclass

import numpy as np

from training.data.shards.shard_reader import Shard
from training.data.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredText:
    """The text that a validation scores.

    Attributes:
        tokens: the targets of all validation windows in order, one-dimensional ids.
        byte_count: bytes of their text; end-of-text tokens have none.
    """

    tokens: np.ndarray
    byte_count: int

    @classmethod
    def of_windows(cls, shard: Shard, tokenizer: Tokenizer, *, windows: int, seq_len: int) -> "ScoredText":
        """The text of the first `windows` windows of a validation shard."""
        tokens = np.asarray(shard.read()[1 : windows * seq_len + 1])
        return cls(tokens, int(tokenizer.token_byte_lengths()[tokens].sum()))

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of a model with this mean loss, including its loss on end-of-text tokens."""
        return nats_per_token * len(self.tokens) / (math.log(2) * self.byte_count)

    def gzip_bits_per_byte(self, tokenizer: Tokenizer) -> float:
        """Bits per byte of `gzip -9` on the same text, with documents separated by a newline."""
        documents = np.split(self.tokens, np.flatnonzero(self.tokens == tokenizer.end_of_text_id))
        text = b"\n".join(tokenizer.decode_bytes(part[part != tokenizer.end_of_text_id].tolist()) for part in documents)
        return 8 * len(gzip.compress(text, compresslevel=9)) / self.byte_count
