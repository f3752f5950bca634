"""What a tokenizer.json says about how it encodes."""

from collections.abc import Mapping
from typing import Any


def adds_special_tokens(post_processor: Mapping[str, Any] | None) -> bool:
    """Return whether the post-processor of a tokenizer.json adds tokens to the text."""
    if not post_processor:
        return False
    if post_processor["type"] == "Sequence":
        return any(map(adds_special_tokens, post_processor["processors"]))
    return post_processor["type"] != "ByteLevel" and post_processor.get("special_tokens") != {}
