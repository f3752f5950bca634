"""The files of a tokenizer other than `tokenizer.json`, and what they say about how it encodes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.cli_errors import InputError, one_line
from common.json_files import read_json_object
from common.tokenizer_json import adds_special_tokens

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"),
)

# Of `tokenizer_config.json`: rewritten on save, or about where the files came from.
NOT_KEPT = ("model_max_length", "is_local", "local_files_only", "auto_map", "name_or_path", "added_tokens_decoder")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the settings of `tokenizer_config.json` and `special_tokens_map.json`, special tokens as text."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        try:
            config |= read_json_object(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path} ({one_line(error, 120)}); restore it, or delete it") from None
    return {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in config.items()
    }


def write_tokenizer_config(folder: Path, config: Mapping[str, Any], model_max_length: int | None) -> None:
    """Write `tokenizer_config.json`, with the longest text of the model that the tokenizer belongs to."""
    kept = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if model_max_length is not None:
        kept["model_max_length"] = model_max_length
    text = json.dumps(kept, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def needs_library(data: dict[str, Any], config: Mapping[str, Any], end_of_text: str) -> bool:
    """Return whether added words, flags of special tokens, or a token before every text need the library's rules."""
    added = data.get("added_tokens", [])
    flags = ("lstrip", "rstrip", "single_word")
    unusual = any(not token.get("special") or any(map(token.get, flags)) for token in added)
    texts = [token["content"] for token in added]
    unusual |= any(" " in text or any(text in other for other in texts if other != text) for text in texts)
    adds_tokens = adds_special_tokens(data.get("post_processor"))
    return unusual or adds_tokens or config.get("bos_token", end_of_text) not in (None, end_of_text)
