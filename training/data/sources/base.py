"""A corpus: documents in a fixed order, read from the start or from a known position.

Three kinds: documentation strings of the installed packages (no download), files and folders, and Hub datasets.
Files and Hub datasets are streamed: memory holds a row group or a line at a time. Only text files are read into
memory completely.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.cli_errors import InputError, did_you_mean

INSTALLED_DOCS = "installed-docs"
HUB_CORPORA = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
DEFAULT_HUB_CONFIG = "sample-10BT"

TEXT_ENDINGS = (".txt", ".md")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET_ENDING = ".parquet"
FILE_ENDINGS = (*TEXT_ENDINGS, *JSONL_ENDINGS, PARQUET_ENDING)

Position = Any
"""Where a document begins; each kind of corpus has its own form, which JSON can represent."""


class Document(NamedTuple):
    """A text that is not blank, in valid Unicode.

    Attributes:
        position: where reading can start at this document; None where the corpus has no position for it.
        replaced: whether invalid bytes or lone surrogates were replaced by U+FFFD.
    """

    text: str
    position: Position | None = None
    replaced: bool = False


class Corpus(ABC):
    """Documents in a fixed order; its name is the prefix of the shards' file names."""

    name: str

    @property
    @abstractmethod
    def revision(self) -> str:
        """Return an identifier of the content."""

    @abstractmethod
    def is_position(self, value: object) -> bool:
        """Return whether a value, read from a manifest, is a position of this corpus."""

    @abstractmethod
    def _read(self, start: Position | None) -> Iterator[Document]: ...

    def at_revision(self, revision: str) -> "Corpus | None":
        """Return the corpus with the content it had at `revision`, or None if that content no longer exists."""
        return self if self.revision == revision else None

    def holds(self, revision: str) -> bool:
        """Return whether the content at `revision` is this corpus's, or was and can still be read.

        Raises:
            InputError: the corpus cannot be reached, so that it is unknown.
        """
        return self.revision == revision

    def fraction_before(self, position: Position) -> float | None:
        """Return the fraction of the corpus that lies before a position, in [0, 1]; None where unknown."""
        return None

    def min_tokens(self) -> int | None:
        """Return a lower bound on the number of tokens, for checking disk space; None where unknown."""
        return None

    def documents(self) -> Iterator[str]:
        """Yield the text of each document, from the first."""
        return (document.text for document in self.read())

    def read(self, start: Position | None = None) -> Iterator[Document]:
        """Yield the documents that are not blank, from the first or from a position.

        Raises:
            InputError: the source is corrupted, or holds no document.
        """
        empty = True
        for text, position, replaced in self._read(start):
            if text and not text.isspace():
                empty = False
                valid = _replace_lone_surrogates(text)
                yield Document(valid, position, replaced or valid is not text)
        if empty and start is None:
            raise InputError(f"corpus '{self.name}' holds no documents; pass another --corpus")


def corpus_name(corpus: str) -> str:
    """Return the name of a corpus in shards and manifest; the corpus need not exist here."""
    if corpus in (INSTALLED_DOCS, *HUB_CORPORA):
        return corpus
    name = Path(corpus).resolve().name
    endings = [ending for ending in FILE_ENDINGS if name.lower().endswith(ending)]
    stem = name.removesuffix(name[-len(max(endings, key=len)) :]) if endings else name
    # An underscore would make NAME_val_000000.npy ambiguous.
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "corpus"


def text_of(row: Any, text_field: str, where: str) -> str:
    """Return the text of the row found at `where`; null is an empty document, anything else an `InputError`."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object but {type(row).__name__}")
    if text_field not in row:
        raise missing_field(text_field, row, where)
    text = row[text_field]
    if text is not None and not isinstance(text, str):
        raise InputError(
            f"field '{text_field}' of {where} holds {type(text).__name__}, not text; name the text with --text_field"
        )
    return text or ""


def missing_field(text_field: str, fields: Iterable[str], where: str) -> InputError:
    """Return the error for a row without the field; it lists the fields that exist."""
    fields = list(fields)
    found = ", ".join(fields) or "no fields"
    hint = did_you_mean(text_field, fields)
    return InputError(f"no field '{text_field}' in {where}, only {found}; name the field with --text_field{hint}")


def _replace_lone_surrogates(text: str) -> str:
    """Join pairs of surrogates and replace lone ones by U+FFFD; escapes in JSON and Python can produce both."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
