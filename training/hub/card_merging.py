"""A card that is written again over one that a person may have edited: only the generated sections are replaced.

    <!-- generated: results -->
    …
    <!-- end of generated: results -->

A section whose marks a person removed stays away. The last line of a pushed card holds a hash of everything that is not
generated, so that the next push knows whether somebody edited the card on the Hub since.
"""

import hashlib
import re
from typing import Any

import yaml

_SECTION = re.compile(r"<!-- generated: (\w+) -->\n(.*?)<!-- end of generated: \1 -->", re.DOTALL)
_STAMP = re.compile(r"\n*<!-- pushed: ([0-9a-f]{16}) -->\n*")
_METADATA = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\r?\n?", re.DOTALL)
_AFTER_STEP = re.compile(r", after step [\d,]+$")
_RESULTS = "model-index"


def section(name: str, content: str) -> str:
    """A generated section with its marks."""
    return f"<!-- generated: {name} -->\n{content.rstrip()}\n<!-- end of generated: {name} -->\n"


def merged(generated: str, kept: str) -> str:
    """`kept` with the sections, and the results in the metadata, of `generated`.

    Metadata that `kept` has stay as they are, but for the results of the same measurement; new ones are added. A card
    without any marks keeps all its text, and the generated text follows it.
    """
    kept = _STAMP.sub("\n", kept)
    new_metadata, new_text = _split(generated)
    metadata, text = _split(kept)
    if new_metadata:
        metadata = {**new_metadata, **(metadata or {}), _RESULTS: _results(new_metadata, metadata or {})}
        if not metadata[_RESULTS]:
            del metadata[_RESULTS]
    new_sections = {match[1]: match[0] for match in _SECTION.finditer(new_text)}
    if _SECTION.search(text):
        text = _SECTION.sub(lambda match: new_sections.get(match[1], match[0]), text)
    else:
        text = "\n\n".join(part for part in (text.strip(), new_text.strip()) if part) + "\n"
    return _joined(metadata, text)


def generated_text(card: str, change: dict[str, str]) -> str:
    """The card with words replaced in its generated sections."""

    def changed(match: "re.Match[str]") -> str:
        text = match[0]
        for old, new in change.items():
            text = text.replace(old, new)
        return text

    return _SECTION.sub(changed, card)


def stamped(card: str) -> str:
    """The card as it is pushed: with the hash of what is not generated in its last line."""
    card = _STAMP.sub("\n", card)
    return f"{card.rstrip()}\n\n<!-- pushed: {_fingerprint(card)} -->\n"


def was_edited(card: str) -> bool:
    """Whether somebody changed a card since it was pushed, or it was never pushed by us."""
    stamp = _STAMP.search(card)
    return stamp is None or stamp[1] != _fingerprint(_STAMP.sub("\n", card))


def _fingerprint(card: str) -> str:
    metadata, text = _split(card)
    rest = {key: value for key, value in (metadata or {}).items() if key != _RESULTS}
    words = " ".join(_SECTION.sub(lambda match: match[1], text).split())
    return hashlib.sha256(f"{yaml.safe_dump(rest)}\n{words}".encode()).hexdigest()[:16]


def _split(card: str) -> tuple[dict[str, Any] | None, str]:
    """Metadata and text; metadata that are no YAML count as text, so that nothing is lost."""
    match = _METADATA.match(card)
    if match is None:
        return None, card
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return None, card
    return (metadata, card[match.end() :]) if isinstance(metadata, dict) else (None, card)


def _joined(metadata: dict[str, Any] | None, text: str) -> str:
    if not metadata:
        return text
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n\n{text.lstrip()}"


def _results(new: dict[str, Any], kept: dict[str, Any]) -> list[dict[str, Any]]:
    """The model-index: our results replace those of the same metric on the same data; others stay."""
    ours = new.get(_RESULTS) or []
    theirs = kept.get(_RESULTS) or []
    measured = {what for model in ours for result in model["results"] for what in _measured(result)}
    others = [
        result
        for model in theirs
        for result in model.get("results") or []
        if not measured.intersection(_measured(result))
    ]
    if not ours:
        return list(theirs)
    return [{**ours[0], "results": [*ours[0]["results"], *others]}]


def _measured(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What a result measures, by data set and metric: the same after every step."""
    dataset = (result.get("dataset") or {}).get("name", "")
    names = [str(metric.get("name") or metric.get("type", "")) for metric in result.get("metrics") or []]
    return [(dataset, _AFTER_STEP.sub("", name)) for name in names]
