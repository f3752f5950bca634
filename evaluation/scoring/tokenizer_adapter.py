"""A Hugging Face tokenizer as an `Encoder` of tasks."""

from collections.abc import Sequence
from typing import Any

from common.cli_errors import InputError
from common.tokenizer_json import unicode_to_bytes


class TokenizerAdapter:
    """Text to ids and back with a tokenizer of transformers; no special tokens are added.

    Raises:
        InputError: the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A model that was trained with a token at the beginning of every text expects that one.
        ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
        if not ids:
            raise InputError(
                "the tokenizer has no token for the beginning or the end of a text; set bos_token or eos_token in its "
                "tokenizer_config.json"
            )
        self.end_of_text_id = int(ids[0])
        # What the tokenizer puts before every text when it is called.
        bare, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        self.bos_ids = next((tuple(ids[:n]) for n in range(len(ids)) if ids[n : n + len(bare)] == bare), ())
        self._special = set(tokenizer.all_special_ids)
        self._added = set(tokenizer.get_added_vocab())  # plain text, such as runs of spaces in GPT-NeoX's
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_level = type(decoder).__name__ == "ByteLevel"

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens spelled out in it are plain text."""
        # `verbose=False`: no warning about texts longer than the model, which are truncated later.
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of `ids`, without special tokens.

        Exact for byte-level tokenizers, even where `ids` begin or end inside a character.
        """
        if not self._byte_level:
            return self.decode(ids).encode()
        tokens = self._tokenizer.convert_ids_to_tokens([i for i in ids if i not in self._special])
        byte_of = unicode_to_bytes()
        return b"".join(
            token.encode() if token in self._added else bytes(byte_of[character] for character in token)
            for token in tokens
        )
