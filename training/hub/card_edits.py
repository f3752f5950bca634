"""Cards that people edit: a push replaces the card on the Hub, but keeps edits made there.

The last line of every card is a comment with hashes of the metadata and of the text as we wrote them. A part whose hash
differs was edited. Edited metadata only gain keys and results, and an edited text only gets new results.
"""

import hashlib
import re

import yaml
from huggingface_hub import ModelCard

_GENERATED = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end of generated: \1 -->\n", re.DOTALL)
_STAMP = re.compile(r"\n*<!-- pushed: (\w+) (\w+) -->\n*")


def with_edits_of(existing: str | None, card: str) -> tuple[str, bool]:
    """Return the card that replaces an existing one, and whether it keeps the existing text because that was edited.

    A card without our comment counts as edited, unless it has no text. Blocks between the comments `generated: NAME`
    and `end of generated: NAME` are always replaced.
    """
    new = ModelCard(_STAMP.sub("\n", card))
    stamp = _stamp_of(new)
    text_stays = False
    if existing is not None:
        old = _parsed(existing)
        metadata_hash, text_hash = found.groups() if (found := _STAMP.search(old.text)) else ("", "")
        old.text = _STAMP.sub("\n", old.text)
        text_stays = _hash(old.text.strip()) != text_hash and bool(old.text.strip())
        if text_stays:
            blocks = {block[1]: block[0] for block in _GENERATED.finditer(new.text)}
            new.text = _GENERATED.sub(lambda block: blocks.get(block[1], block[0]), old.text)
        if _hash(_metadata(old)) != metadata_hash:
            _keep_metadata(old, new)
    return f"{str(new).rstrip()}\n\n{stamp}\n", text_stays


def _parsed(card: str) -> ModelCard:
    """Parse a card; metadata that are not valid YAML become part of the text."""
    try:
        return ModelCard(card, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError):
        parsed = ModelCard("")
        parsed.text = card
        return parsed


def _keep_metadata(old: ModelCard, new: ModelCard) -> None:
    """Give `new` the metadata of `old`, and those of its results that `new` does not measure."""
    measured, earlier = (card.data.get("eval_results", []) for card in (new, old))
    others = [result for result in earlier if not any(result.is_equal_except_value(ours) for ours in measured)]
    for key, value in vars(old.data).items():
        if value is not None:
            new.data[key] = value
    new.data["eval_results"] = [*measured, *others] or None


def _stamp_of(card: ModelCard) -> str:
    return f"<!-- pushed: {_hash(_metadata(card))} {_hash(card.text.strip())} -->"


def _metadata(card: ModelCard) -> str:
    metadata = card.data.to_dict()
    for key in ("model-index", "model_name"):
        metadata.pop(key, None)
    return yaml.safe_dump(metadata)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
