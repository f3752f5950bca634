"""Tokenised text of the papers goes back to how it was written."""

import pytest

from evaluation.tasks.detokenizers import detokenise_penn_treebank, detokenise_wikitext


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        ("she said , `` I do n't know -LRB- yet -RRB- . ''", 'she said, "I don\'t know (yet)."'),
        ("` Well , ' said he ; ` it 's the boys ' . '", "'Well,' said he; 'it's the boys'.'"),
        ("The other replied , ' I do not . '", "The other replied, 'I do not.'"),
        ("a well-known -- and dear -- friend", "a well-known -- and dear -- friend"),
    ],
)
def test_penn_treebank_goes_back_to_text(tokenised, written):
    assert detokenise_penn_treebank(tokenised) == written


@pytest.mark.parametrize(
    ("tokenised", "written"),
    [
        (" = = Career = = \n", "== Career ==\n"),
        (' a guest @-@ starring role on the " Herons " , in 2000 ( aged 12 ) . \n',
         'a guest-starring role on the "Herons", in 2000 (aged 12).\n'),
        (" It cost $ 1 @,@ 000 @.@ 50 ; he didn 't pay . \n", "It cost $1,000.50; he didn't pay.\n"),
        (" \n", "\n"),
    ],
)  # fmt: skip
def test_wikitext_goes_back_to_text(tokenised, written):
    assert detokenise_wikitext(tokenised) == written
