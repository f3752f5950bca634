"""Bits per byte, worked out by hand."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from training.data.shards.shard_reader import Shard
from training.data.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from training.monitoring.validation import ScoredText


@pytest.fixture
def bytes_tokenizer() -> Tokenizer:
    """One token a byte, and the end of text."""
    return Tokenizer({bytes([byte]): byte for byte in range(256)}, {END_OF_TEXT: 256})


def shard_of(ids: list[int], path: Path) -> Shard:
    np.save(path, np.array(ids, dtype="<u2"))
    return Shard(path, "val", len(ids))


def test_a_byte_level_loss_of_ln_2_is_one_bit_per_byte(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = ScoredText(shard_of([*b"_abcdefgh", 0], tmp_path / "v.npy"), bytes_tokenizer, windows=2, seq_len=4)
    assert bytes(text.tokens.tolist()) == b"abcdefgh"  # the first token is only an input
    assert text.byte_count == 8
    assert text.bits_per_byte(math.log(2)) == pytest.approx(1.0)


def test_end_of_text_tokens_cost_bits_but_count_no_bytes(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [0, *b"abc", 256, *b"abc", 256]
    text = ScoredText(shard_of(ids, tmp_path / "v.npy"), bytes_tokenizer, windows=1, seq_len=8)
    assert text.byte_count == 6
    assert text.bits_per_byte(math.log(2)) == pytest.approx(8 / 6)
    # The same text and the same denominator for gzip, a line feed where a document ends.
    expected = 8 * len(gzip.compress(b"abc\nabc\n", compresslevel=9)) / 6
    assert text.gzip_bits_per_byte(bytes_tokenizer) == pytest.approx(expected)
