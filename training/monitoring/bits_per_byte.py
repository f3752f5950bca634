"""Loss as compression: bits per byte, which compares across tokenizers, and gzip's on the same text."""

import gzip
import math
from dataclasses import dataclass

import numpy as np

from training.data.shards.shard_reader import Shard
from training.data.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredText:
    """The text that a validation predicts.

    Attributes:
        tokens: the targets of all validation windows, in order, one-dimensional ids.
        byte_count: bytes of their text; an end-of-text token is none, for the model as for gzip.
    """

    tokens: np.ndarray
    byte_count: int

    @classmethod
    def of_windows(cls, shard: Shard, tokenizer: Tokenizer, *, windows: int, seq_len: int) -> "ScoredText":
        """The text of the first `windows` windows of a validation shard."""
        tokens = np.asarray(shard.read()[1 : windows * seq_len + 1])
        return cls(tokens, int(tokenizer.token_byte_lengths()[tokens].sum()))

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits that a model with this mean loss spends on a byte of the text, ends of documents included."""
        return nats_per_token * len(self.tokens) / (math.log(2) * self.byte_count)

    def gzip_bits_per_byte(self, tokenizer: Tokenizer) -> float:
        """Bits that `gzip -9` spends on a byte of the same text, documents parted by a line feed."""
        documents = np.split(self.tokens, np.flatnonzero(self.tokens == tokenizer.end_of_text_id))
        text = b"\n".join(tokenizer.decode_bytes(part[part != tokenizer.end_of_text_id].tolist()) for part in documents)
        return 8 * len(gzip.compress(text, compresslevel=9)) / self.byte_count
