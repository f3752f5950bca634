"""Tokenized text of the papers becomes ordinary text."""

import pytest

from evaluation.tasks.detokenizers import detokenize_penn_treebank, detokenize_wikitext


@pytest.mark.parametrize(
    ("tokenized", "expected"),
    [
        ("she said , `` I do n't know -LRB- yet -RRB- . ''", 'she said, "I don\'t know (yet)."'),
        ("` Well , ' said he ; ` it 's the boys ' . '", "'Well,' said he; 'it's the boys'.'"),
        ("The other replied , ' I do not . '", "The other replied, 'I do not.'"),
        ("a well-known -- and dear -- friend", "a well-known -- and dear -- friend"),
    ],
)
def test_penn_treebank_is_detokenized(tokenized, expected):
    assert detokenize_penn_treebank(tokenized) == expected


@pytest.mark.parametrize(
    ("tokenized", "expected"),
    [
        (" = = Career = = \n", "== Career ==\n"),
        (' a guest @-@ starring role on the " Herons " , in 2000 ( aged 12 ) . \n',
         'a guest-starring role on the "Herons", in 2000 (aged 12).\n'),
        (" It cost $ 1 @,@ 000 @.@ 50 ; he didn 't pay . \n", "It cost $1,000.50; he didn't pay.\n"),
        (" \n", "\n"),
    ],
)  # fmt: skip
def test_wikitext_is_detokenized(tokenized, expected):
    assert detokenize_wikitext(tokenized) == expected
