"""Detokenizers: from tokenized corpora back to ordinary text.

The GPT-2 paper (section 3.1) uses detokenizers that it does not print. These are ours, for the conventions of the Penn
Treebank (CBT) and of WikiText.
"""

import re
from collections.abc import Sequence

_CONTRACTIONS = r" '(?=(?:s|S|m|d|ll|re|ve|t)\b)"

_PENN_TREEBANK = (
    (r"-L[RSC]B- ?", "("),
    (r" ?-R[RSC]B-", ")"),
    (r"`` ?", '"'),
    (r" ?''", '"'),
    (r"` ?", "'"),
    (r"([,:;]) ' (?=[A-Z])", r"\1 '"),  # some books open a quotation with a closing mark
    (r" '(?= |$)", "'"),
    (_CONTRACTIONS, "'"),
    (r" n't\b", "n't"),
    (r" ([.,;:!?%])", r"\1"),
)

_WIKITEXT = (
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


def detokenize_penn_treebank(text: str) -> str:
    """Return `text` with ordinary quotation marks, brackets, contractions and punctuation."""
    return _apply(_PENN_TREEBANK, text)


def detokenize_wikitext(text: str) -> str:
    """Return WikiText with ordinary numbers, hyphens, punctuation, brackets, quotations and headings."""
    return _apply(_WIKITEXT, text)


def _apply(rules: Sequence[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text
