"""The way back from tokenised corpora to text as people write it.

The GPT-2 paper (section 3.1) removes the traces of tokenisation from its test sets, since WebText has none, and does
not print how. These are ours, for Penn Treebank's conventions (CBT) and WikiText's.
"""

import re
from collections.abc import Sequence

_Rules = Sequence[tuple[re.Pattern[str], str]]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return [(re.compile(pattern, re.MULTILINE), replacement) for pattern, replacement in pairs]


_CONTRACTIONS = r" '(?=(?:s|S|m|d|ll|re|ve|t)\b)"

_PENN_TREEBANK = _rules(
    (r"-L[RSC]B- ?", "("),
    (r" ?-R[RSC]B-", ")"),
    (r"`` ?", '"'),
    (r" ?''", '"'),
    (r"` ?", "'"),
    (r"([,:;]) ' (?=[A-Z])", r"\1 '"),  # some books open a quotation with the sign that closes it
    (r" '(?= |$)", "'"),
    (_CONTRACTIONS, "'"),
    (r" n't\b", "n't"),
    (r" ([.,;:!?%])", r"\1"),
)

_WIKITEXT = _rules(
    (r" @([-,.])@ ", r"\1"),
    (r"^ | $", ""),
    (r"^((?:= )+)(.*?)((?: =)+)$", r"\1\2\3"),
    (r"= (?==)", "="),
    (r" ([.,;:!?%])(?= |$|[)\]\"'])", r"\1"),
    (r"([(\[{]) ", r"\1"),
    (r" ([)\]}])", r"\1"),
    (r'" ([^"\n]*?) ?"(?= |$|[.,;:!?)])', r'"\1"'),
    (_CONTRACTIONS, "'"),
    (r"(?<=s) '(?= )", "'"),
    (r"([$£€]) (?=\d)", r"\1"),
)


def detokenise_penn_treebank(text: str) -> str:
    """Return `text` with quotation marks, brackets, contractions and punctuation as they are written."""
    return _apply(_PENN_TREEBANK, text)


def detokenise_wikitext(text: str) -> str:
    """Return WikiText with numbers, hyphens, punctuation, brackets, quotations and headings as they are written."""
    return _apply(_WIKITEXT, text)


def _apply(rules: _Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text
