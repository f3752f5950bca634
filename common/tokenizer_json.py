"""Properties of a tokenizer.json, and the characters that byte-level BPE writes its tokens in."""

import functools
from collections.abc import Mapping
from typing import Any


def adds_special_tokens(post_processor: Mapping[str, Any] | None) -> bool:
    """Return whether the post-processor of a tokenizer.json adds tokens to the text."""
    if not post_processor:
        return False
    if post_processor["type"] == "Sequence":
        return any(map(adds_special_tokens, post_processor["processors"]))
    return post_processor["type"] != "ByteLevel" and post_processor.get("special_tokens") != {}


@functools.cache
def bytes_to_unicode() -> dict[int, str]:
    """Return a printable character for every byte (openai/gpt-2, encoder.py).

    transformers has the same function, in a module that takes seconds to import.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def unicode_to_bytes() -> dict[str, int]:
    """Return the inverse of `bytes_to_unicode`."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
