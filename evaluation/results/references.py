"""Published results of OpenAI's GPT-2, each with its protocol and its source: the references in our plots and tables.

A result is compared with results of the same protocol only: on LAMBADA the same model has an accuracy of 26, 33, 46 or
47 %, depending on the protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Size = Literal["124M", "355M", "774M", "1.5B"]
SIZES: tuple[Size, ...] = ("124M", "355M", "774M", "1.5B")

_PAPER = "GPT-2 paper, table 3"
_PAPER_CBT = "GPT-2 paper, table 3 (CBT: its validation questions; ours are the test questions)"
_KARPATHY = "build-nanogpt and llm.c, hellaswag.py"
_OWN_HARNESS = "README of a from-scratch GPT-2, its own harness"
_OWN_HARNESS_CBT = f"{_OWN_HARNESS} (CBT: protocol not stated in full)"


@dataclass(frozen=True)
class Reference:
    """A published result of a GPT-2: a fraction for accuracies, nats per token for losses.

    `task` names the protocol too, "hellaswag:harness"; it may not be one of our tasks.
    """

    task: str
    metric: str
    size: Size
    value: float
    source: str


def _row(task: str, metric: str, source: str, *values: float | None) -> tuple[Reference, ...]:
    """Return the results of the four sizes; None where none was published."""
    return tuple(
        Reference(task, metric, size, value, source)
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
    # The paper's perplexities on LAMBADA (35.13, 15.60, 10.87, 8.63) are omitted: it does not describe their protocol,
    # and a filter of the greedy choice does not change the harness's perplexity, 40.06 above.
    *_row("lambada:word", "acc", _OWN_HARNESS, 0.2606, 0.3776, 0.4058, 0.4469),
    *_row("cbt_cn:paper", "acc", _PAPER_CBT, 0.8765, 0.9235, 0.9345, 0.9330),
    *_row("cbt_ne:paper", "acc", _PAPER_CBT, 0.834, 0.871, 0.880, 0.8905),
    # That project does not detokenize the text. Whether its text includes the twenty sentences is not clear.
    *_row("cbt_ne:full_sequence_raw", "acc", _OWN_HARNESS_CBT, 0.5933, 0.6711, 0.6895, 0.7232),
    *_row("cbt_ne:full_sentence_raw", "acc", _OWN_HARNESS_CBT, 0.5933, 0.6711, 0.6895, 0.7232),
    *_row("wikitext2:paper", "word_ppl", _PAPER, 29.41, 22.76, 19.93, 18.34),
    *_row("wikitext103:paper", "word_ppl", _PAPER, 37.50, 26.37, 22.05, 17.48),
    *_row("openwebtext:training", "loss", "nanoGPT, README", 3.11, 2.85, 2.66, 2.56),
)

# By corpus. A loss depends on corpus and tokenizer; these are for GPT-2's tokenizer.
VALIDATION_LOSS: dict[str, tuple[Reference, ...]] = {
    "fineweb-edu": _row("fineweb-edu:validation", "loss", "build-nanogpt, play.ipynb", 3.2924),
    "Skylion007/openwebtext": _row("openwebtext:validation", "loss", "nanoGPT, README", 3.12, 2.84, 2.67, 2.54),
}


def published(task: str, metric: str) -> list[Reference]:
    """Return the published results of a task under its protocol ("hellaswag:harness"), smaller models first."""
    found = [reference for reference in PUBLISHED if (reference.task, reference.metric) == (task, metric)]
    return sorted(found, key=lambda reference: SIZES.index(reference.size))


def one_per_size(references: Sequence[Reference]) -> dict[Size, Reference]:
    """Return the first reference of each size."""
    found: dict[Size, Reference] = {}
    for reference in references:
        found.setdefault(reference.size, reference)
    return found
