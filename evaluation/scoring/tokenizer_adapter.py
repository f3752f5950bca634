"""A Hugging Face tokenizer as tasks see one: plain text to ids and back, and what stands before a text."""

from collections.abc import Sequence
from typing import Any

from common.byte_level import unicode_to_bytes
from common.cli_errors import InputError


class HubEncoder:
    """Text to ids and back with a tokenizer of transformers, which adds no token of its own.

    Args:
        tokenizer: as `AutoTokenizer.from_pretrained` gives it.

    Raises:
        InputError: it has no token that could stand before a text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A model that was trained with a token at the beginning of every text expects that one.
        start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        if start is None:
            raise InputError(
                "expected a tokenizer with a token for the beginning or the end of a text, found neither; set "
                "bos_token or eos_token in its tokenizer_config.json"
            )
        self._start = int(start)
        self._special = set(tokenizer.all_special_ids)
        self._as_spelt = set(tokenizer.get_added_vocab())  # such as runs of spaces in GPT-NeoX's
        self._byte_level = _is_byte_level(tokenizer)
        self._beginning = _beginning(tokenizer)

    @property
    def end_of_text_id(self) -> int:
        """The token that stands before a text that has nothing before it."""
        return self._start

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens that the tokenizer's own call puts before every text, as lm-evaluation-harness does."""
        return self._beginning

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; a special token that is spelt out in it is not one."""
        # Without `verbose` a text longer than the model brings no warning: it is cut later.
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of text that `ids` stand for: none for special tokens.

        Exact for byte-level tokenizers, even where `ids` begin or end inside a character.
        """
        if not self._byte_level:
            return self.decode(ids).encode()
        tokens = self._tokenizer.convert_ids_to_tokens([i for i in ids if i not in self._special])
        return b"".join(token.encode() if token in self._as_spelt else _character_bytes(token) for token in tokens)


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    own = tokenizer("a")["input_ids"]
    return next((tuple(own[:n]) for n in range(len(own)) if own[n : n + len(bare)] == bare), ())


def _is_byte_level(tokenizer: Any) -> bool:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return type(decoder).__name__ == "ByteLevel"


def _character_bytes(token: str) -> bytes:
    """Return the bytes that a byte-level token spells."""
    table = unicode_to_bytes()
    return bytes(table[character] for character in token)
