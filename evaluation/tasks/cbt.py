"""Children's Book Test: which of ten words is missing in a sentence that follows twenty others (Hill et al. 2016).

2,500 test questions each for common nouns and named entities. A protocol without `_raw` reads the text as the GPT-2
paper does, with the traces of Penn Treebank tokenisation removed; with `_raw` as it stands. (The paper's own figures
are those of the validation questions: one of the test books is in its training data.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.tasks.context_split import behind_the_same_context, context_of, cut_together
from evaluation.tasks.data_sources import check_row, find_file, hub_rows, not_usable, read_lines
from evaluation.tasks.detokenizers import detokenise_penn_treebank
from evaluation.tasks.hellaswag import first_largest
from evaluation.tasks.task_types import Encoder, Figure, Item, LogLikelihood, Request, Task, data_hash

BLANK = "XXXXX"
_SENTENCES = 20
_CANDIDATES = 10
_FIELDS: dict[str, type | tuple[type, ...]] = {"sentences": list, "question": str, "answer": str, "options": list}


class _Cbt(Task):
    figures: ClassVar = (Figure("acc", "accuracy", "prediction"),)

    def __init__(self, kind: str, *, detokenised: bool) -> None:
        self.kind = kind
        self.name = f"cbt_{kind.lower()}"
        self.detokenised = detokenised
        if not detokenised:
            self.protocol = f"{type(self).protocol}_raw"
            self.description = f"{type(self).description} The text as it stands."

    def items(self, data_dir: Path | None, encoder: Encoder, n_positions: int, limit: int | None = None) -> list[Item]:
        """Return the first `limit` items, as `Task.items` says."""
        items = []
        for index, row in enumerate(read_rows(data_dir, self.kind, limit)):
            requests = self._cut(self._requests(row, encoder), n_positions)
            items.append(
                Item(
                    index,
                    requests,
                    gold=row["options"].index(row["answer"]),
                    data=data_hash([row[field] for field in _FIELDS]),
                )
            )
        return items

    def predict(self, item: Item, answers: Sequence[LogLikelihood]) -> dict[str, Any]:
        """Return the record, as `Task.predict` says."""
        return {
            "index": item.index,
            "gold": item.gold,
            "prediction": first_largest([self._merit(answer) for answer in answers]),
            "log_likelihoods": [answer.sum for answer in answers],
            "tokens": [answer.tokens for answer in answers],
        }

    def _requests(self, row: dict[str, Any], encoder: Encoder) -> Sequence[Request]:
        before, _, after = row["question"].partition(BLANK)
        context = " ".join([*(row["sentences"] if self._with_sentences else ()), before])
        texts = [f"{context}{option}{after}" for option in row["options"]]
        return behind_the_same_context(encoder, self._written(context), [self._written(text) for text in texts])

    def _written(self, text: str) -> str:
        return detokenise_penn_treebank(text) if self.detokenised else text

    _with_sentences: ClassVar = True

    def _cut(self, requests: Sequence[Request], n_positions: int) -> tuple[Request, ...]:
        """Return requests that fit, all candidates behind the same context."""
        return cut_together(requests, n_positions)

    def _merit(self, answer: LogLikelihood) -> float:
        return answer.sum


class CbtPaper(_Cbt):
    """The candidate and the rest of its sentence, behind everything before."""

    protocol = "paper"
    description = (
        "Twenty sentences and the question up to the blank as context; the candidate with the highest probability of "
        "itself and the rest of the sentence. Too long contexts lose their beginning."
    )
    source = "GPT-2 paper, section 3.2"


class CbtSentence(_Cbt):
    """As the paper, from the sentence alone."""

    protocol = "sentence"
    description = (
        "The question alone, without the twenty sentences: the candidate with the highest probability of itself and "
        "the rest of the sentence."
    )
    source = "CBT paper (Hill et al. 2016), section 4.3: language models on the query alone"
    _with_sentences: ClassVar = False


class CbtFullSequence(_Cbt):
    """The candidate that makes the whole text the most likely, by the mean over its tokens."""

    protocol = "full_sequence"
    description = (
        "Twenty sentences and the question with the candidate in its place: the candidate with the lowest mean loss "
        "over all tokens of the text but the first."
    )
    source = "from-scratch projects that compare the model's loss of each filled-in text"

    def _requests(self, row: dict[str, Any], encoder: Encoder) -> Sequence[Request]:
        filled = [row["question"].replace(BLANK, option, 1) for option in row["options"]]
        texts = [encoder.encode(self._written(" ".join([*row["sentences"], sentence]))) for sentence in filled]
        return [Request(context_of(encoder, ids[:1]), tuple(ids[1:])) for ids in texts]

    def _cut(self, requests: Sequence[Request], n_positions: int) -> tuple[Request, ...]:
        """Return texts that fit: the context is the first token, so what is scored loses as much of its beginning."""
        surplus = max(0, max(len(request.continuation) for request in requests) - n_positions)
        if not surplus:
            return tuple(requests)
        texts = [(request.context[-1:] + request.continuation)[surplus:] for request in requests]
        return tuple(Request(text[:1], text[1:]) for text in texts)

    def _merit(self, answer: LogLikelihood) -> float:
        return answer.sum / answer.tokens


def cbt_tasks(kind: str) -> list[Task]:
    """Return every protocol for `kind`, "CN" or "NE", the default first."""
    classes = (CbtPaper, CbtFullSequence, CbtSentence)
    return [each(kind, detokenised=detokenised) for each in classes for detokenised in (True, False)]


def read_rows(data_dir: Path | None, kind: str, limit: int | None) -> list[dict[str, Any]]:
    """Return questions as {"sentences": twenty, "question", "answer", "options": ten}.

    Raises:
        InputError: a question is not of that form.
    """
    if data_dir is None:
        where = "cam-cst/cbt"
        rows = hub_rows(where, kind, "test", limit)
        for number, row in enumerate(rows, 1):
            check_row(row, _FIELDS, where, number)
            _check(row, where, number)
        return rows
    return _parse(find_file(data_dir, [f"cbtest_{kind}_test_2500ex.txt", f"cbtest_{kind}_test*.txt"]), limit)


def _parse(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """Read the official form: numbered lines, the 21st with tabs: question, answer, nothing, candidates with bars."""
    rows: list[dict[str, Any]] = []
    sentences: list[str] = []
    number = 0
    for number, line in enumerate(read_lines(path), 1):
        if len(rows) == limit:
            return rows
        if not line.strip():
            if sentences:
                raise not_usable(path, number, f"sentence {len(sentences) + 1} of a question", "an empty line")
            continue
        place, _, text = line.rstrip("\n").partition(" ")
        if place != str(len(sentences) + 1):
            raise not_usable(path, number, f"a line that begins with {len(sentences) + 1}", repr(line[:30]))
        if len(sentences) < _SENTENCES:
            sentences.append(text)
            continue
        parts = text.split("\t")
        if len(parts) != 4:
            raise not_usable(path, number, "question, answer, nothing and candidates between tabs", repr(line[-40:]))
        row = {"sentences": sentences, "question": parts[0], "answer": parts[1], "options": parts[3].split("|")}
        _check(row, path, number)
        rows.append(row)
        sentences = []
    if sentences:
        raise not_usable(path, number + 1, f"sentence {len(sentences) + 1} of a question", "the end of the file")
    return rows


def _check(row: dict[str, Any], where: Path | str, number: int) -> None:
    if len(row["sentences"]) != _SENTENCES:
        raise not_usable(where, number, f"{_SENTENCES} sentences", str(len(row["sentences"])))
    if BLANK not in row["question"]:
        raise not_usable(where, number, f"a question with {BLANK}", repr(row["question"][:40]))
    if len(row["options"]) != _CANDIDATES or row["answer"] not in row["options"]:
        found = f"{row['answer']!r} and {row['options']!r}"
        raise not_usable(where, number, f"{_CANDIDATES} candidates with the answer among them", found[:80])
