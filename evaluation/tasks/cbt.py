"""Children's Book Test: which of ten words is missing in a sentence after twenty others (Hill et al. 2016).

There are 2,500 test questions each for common nouns (CN) and named entities (NE). A protocol without `_raw` removes the
traces of Penn Treebank tokenization, as the GPT-2 paper does; with `_raw` it keeps the text as it is. The paper's
accuracies are those of the validation questions, because one of the test books is in its training data.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.data_sources import RowTask, read_lines, unusable
from evaluation.tasks.detokenizers import detokenize_penn_treebank
from evaluation.tasks.encoding import context_tokens, encode_candidates, truncate_together
from evaluation.tasks.task_types import Encoder, Item, LogLikelihood, Metric, Request, Task, argmax, data_hash

_BLANK = "XXXXX"
_SENTENCES = 20
_CANDIDATES = 10


class _Cbt(RowTask):
    """A protocol for one kind of question, "CN" or "NE"."""

    metrics: ClassVar = (Metric("acc", "accuracy", "prediction"),)
    reads_sentences = True  # those before the question
    repository = "cam-cst/cbt"
    split = "test"
    fields: ClassVar = {"sentences": list, "question": str, "answer": str, "options": list}

    def __init__(self, kind: str, *, raw: bool) -> None:
        self.name = f"cbt_{kind.lower()}"
        self._raw = raw
        if raw:
            self.protocol = f"{type(self).protocol}_raw"
            self.description = f"{type(self).description} The text is left as it is."
        self.config = kind
        self.file_names = (f"cbtest_{kind}_test_2500ex.txt", f"cbtest_{kind}_test*.txt")

    def _parse(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Parse numbered lines, the 21st with tabs between question, answer, nothing and candidates."""
        sentences: list[str] = []
        number = 0
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip() and not sentences:
                continue
            position, _, text = line.rstrip("\n").partition(" ")
            if position != str(len(sentences) + 1):
                raise unusable(path, number, f"sentence {len(sentences) + 1} of a question is missing: {line[:30]!r}")
            if len(sentences) < _SENTENCES:
                sentences.append(text)
                continue
            parts = text.split("\t")
            if len(parts) != 4:
                raise unusable(path, number, f"not question, answer and candidates between tabs: {line[-40:]!r}")
            question, answer, _, options = parts
            row = {"sentences": sentences, "question": question, "answer": answer, "options": options.split("|")}
            yield number, row
            sentences = []
        if sentences:
            raise unusable(path, number + 1, f"the file ends before sentence {len(sentences) + 1} of a question")

    def _problem(self, row: dict[str, Any]) -> str | None:
        if len(row["sentences"]) != _SENTENCES:
            return f"{len(row['sentences'])} sentences instead of {_SENTENCES}"
        if _BLANK not in row["question"]:
            return f"no {_BLANK} in the question: {row['question'][:40]!r}"
        if len(row["options"]) != _CANDIDATES or row["answer"] not in row["options"]:
            return f"the answer {row['answer']!r} is not among {_CANDIDATES} candidates: {row['options']!r:.60}"
        return None

    def _item(self, index: int, row: dict[str, Any], encoder: Encoder, n_positions: int) -> Item:
        requests = self._requests(row, encoder, n_positions)
        data = data_hash([row[field] for field in self.fields])
        return Item(index, requests, gold=row["options"].index(row["answer"]), data=data)

    def record(self, item: Item, scores: Sequence[LogLikelihood]) -> dict[str, Any]:
        return {
            "gold": item.gold,
            "prediction": argmax([self._compared(score) for score in scores]),
            "log_likelihoods": [score.sum for score in scores],
            "tokens": [score.tokens for score in scores],
        }

    def _text(self, row: dict[str, Any], question: str) -> str:
        """Return what the model reads: the question, or its beginning, after the sentences before it."""
        text = " ".join([*(row["sentences"] if self.reads_sentences else ()), question])
        return text if self._raw else detokenize_penn_treebank(text)

    def _requests(self, row: dict[str, Any], encoder: Encoder, n_positions: int) -> tuple[Request, ...]:
        before, _, after = row["question"].partition(_BLANK)
        texts = [self._text(row, f"{before}{option}{after}") for option in row["options"]]
        return truncate_together(encode_candidates(encoder, self._text(row, before), texts), n_positions)

    def _compared(self, score: LogLikelihood) -> float:
        """Return the value by which candidates are compared."""
        return score.sum


class CbtPaper(_Cbt):
    """The candidate and the rest of its sentence, after everything before them."""

    protocol = "paper"
    description = (
        "Context: twenty sentences and the question up to the blank. Right if the answer has the highest probability "
        "of itself and the rest of the sentence. Contexts that are too long are truncated on the left."
    )
    source = "GPT-2 paper, section 3.2"


class CbtSentence(_Cbt):
    """As in the paper, but without the twenty sentences."""

    protocol = "sentence"
    description = (
        "Context: the question up to the blank, without the twenty sentences. Right if the answer has the highest "
        "probability of itself and the rest of the sentence."
    )
    source = "CBT paper (Hill et al. 2016), section 4.3: language models on the query alone"
    reads_sentences = False


class CbtFullSequence(_Cbt):
    """The candidate with which the complete text has the lowest mean loss per token."""

    protocol = "full_sequence"
    description = (
        "Twenty sentences and the question with the candidate filled in. Right if the answer gives the lowest mean "
        "loss over all tokens of the text but the first."
    )
    source = "from-scratch projects that compare the model's loss of each filled-in text"

    def _requests(self, row: dict[str, Any], encoder: Encoder, n_positions: int) -> tuple[Request, ...]:
        questions = [row["question"].replace(_BLANK, option, 1) for option in row["options"]]
        texts = [encoder.encode(self._text(row, question)) for question in questions]
        surplus = max(0, max(map(len, texts)) - 1 - n_positions)
        if surplus:  # truncated texts have no beginning-of-sequence tokens: their context is a token of the text
            return tuple(Request(tuple(ids[surplus : surplus + 1]), tuple(ids[surplus + 1 :])) for ids in texts)
        return tuple(Request(context_tokens(encoder, ids[:1]), tuple(ids[1:])) for ids in texts)

    def _compared(self, score: LogLikelihood) -> float:
        return score.sum / score.tokens


class CbtFullSentence(CbtFullSequence):
    """The candidate with which the question has the lowest mean loss per token."""

    protocol = "full_sentence"
    description = (
        "The question with the candidate filled in, without the twenty sentences. Right if the answer gives the lowest "
        "mean loss over all tokens of the question but the first."
    )
    reads_sentences = False


def cbt_tasks(kind: str) -> list[Task]:
    """Return every protocol for `kind`, "CN" or "NE", the default first."""
    protocols = (CbtPaper, CbtFullSequence, CbtFullSentence, CbtSentence)
    return [protocol(kind, raw=raw) for protocol in protocols for raw in (False, True)]
