"""Published figures of OpenAI's GPT-2, each with its protocol and its source: the lines in our plots and tables.

A figure stands beside results of the same task under the same protocol and beside no other: on LAMBADA the same model
is right about 26, 33, 46 or 47 times in a hundred, depending on what counts as right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Size = Literal["124M", "355M", "774M", "1.5B"]
SIZES: tuple[Size, ...] = ("124M", "355M", "774M", "1.5B")

_PAPER = "GPT-2 paper, table 3"
_PAPER_CBT = "GPT-2 paper, table 3 (CBT: its validation questions, not the test questions that are asked here)"
_KARPATHY = "build-nanogpt and llm.c, hellaswag.py"
_OWN_HARNESS = "README of a from-scratch GPT-2, its own harness"


@dataclass(frozen=True)
class Reference:
    """One published figure.

    Attributes:
        task: with its protocol, "hellaswag:harness"; or what else was measured, where that is no task of ours.
        figure: of that task, "acc_norm".
        size: which GPT-2.
        value: a fraction for accuracies, nats per token for losses.
        source: where it stands.
    """

    task: str
    figure: str
    size: Size
    value: float
    source: str


def _row(task: str, figure: str, source: str, *values: float | None) -> tuple[Reference, ...]:
    """Return a row of a table: figures of the four sizes, None where none was published."""
    return tuple(
        Reference(task, figure, size, value, source)
        for size, value in zip(SIZES, values, strict=False)
        if value is not None
    )


PUBLISHED: tuple[Reference, ...] = (
    *_row("hellaswag:harness", "acc", _KARPATHY, 0.2892, None, None, 0.4004),
    *_row("hellaswag:harness", "acc_norm", _KARPATHY, 0.3114, None, None, 0.5089),
    *_row("hellaswag:completion", "acc", _KARPATHY, 0.2859, None, None, 0.3842),
    *_row("hellaswag:completion", "acc_norm", _KARPATHY, 0.2955, None, None, 0.4893),
    *_row("hellaswag:completion", "acc_norm", "llm.c's, build-nanogpt, play.ipynb", 0.2945, 0.3752, 0.4320, 0.4889),
    *_row("lambada:harness", "acc", "lm-evaluation-harness, issues 2159 and 911", 0.3256, None, None, 0.5121),
    *_row("lambada:harness", "ppl", "lm-evaluation-harness, issues 2159 and 911", 40.06, None, None, 10.63),
    *_row("lambada:last_token", "acc", "openai/gpt-2, issue 131", 0.4689),
    *_row("lambada:stop_word_filter", "acc", _PAPER, 0.4599, 0.5548, 0.6012, 0.6324),
    # The paper's perplexities on LAMBADA (35.13, 15.60, 10.87, 8.63) stand beside nothing: it does not say of what they
    # are, and a filter of the greedy choice leaves the harness's perplexity, published above as 40.06, as it is.
    *_row("lambada:word", "acc", _OWN_HARNESS, 0.2606, 0.3776, 0.4058, 0.4469),
    *_row("cbt_cn:paper", "acc", _PAPER_CBT, 0.8765, 0.9235, 0.9345, 0.9330),
    *_row("cbt_ne:paper", "acc", _PAPER_CBT, 0.834, 0.871, 0.880, 0.8905),
    # Such projects score the text of the data set as it stands.
    *_row("cbt_ne:full_sequence_raw", "acc", _OWN_HARNESS, 0.5933, 0.6711, 0.6895, 0.7232),
    *_row("wikitext2:paper", "word_ppl", _PAPER, 29.41, 22.76, 19.93, 18.34),
    *_row("wikitext103:paper", "word_ppl", _PAPER, 37.50, 26.37, 22.05, 17.48),
    *_row("openwebtext:training", "loss", "nanoGPT, README", 3.11, 2.85, 2.66, 2.56),
)

# Losses depend on the corpus and on the tokenizer; each of these holds for one corpus in GPT-2's tokens only.
VALIDATION_LOSS: dict[str, tuple[Reference, ...]] = {
    "fineweb-edu": _row("fineweb-edu:validation", "loss", "build-nanogpt, play.ipynb", 3.2924),
    "Skylion007/openwebtext": _row("openwebtext:validation", "loss", "nanoGPT, README", 3.12, 2.84, 2.67, 2.54),
}


def published(task: str, figure: str) -> list[Reference]:
    """Return the published figures of a task under its protocol ("hellaswag:harness"), smaller models first.

    Where a size has two, both are there, first the one whose source has the others of its row.
    """
    found = [reference for reference in PUBLISHED if (reference.task, reference.figure) == (task, figure)]
    return sorted(found, key=lambda reference: SIZES.index(reference.size))


def one_per_size(references: Sequence[Reference]) -> dict[Size, Reference]:
    """Return the first reference of each size."""
    found: dict[Size, Reference] = {}
    for reference in references:
        found.setdefault(reference.size, reference)
    return found
