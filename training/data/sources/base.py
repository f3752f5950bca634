"""A corpus: documents in a fixed order, read from the start or from a place on, whenever somebody asks.

Three kinds: documentation strings of the installed packages (no download), files and folders, and datasets of the Hub.
Files and the Hub are streamed: memory holds a row group or a line, except that a text file is one document.
"""

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.cli_errors import InputError
from common.suggestions import did_you_mean
from training.data.sources.installed_docs import gather_docstrings, installed_revision, package_roots

INSTALLED_DOCS = "installed-docs"
HUB_CORPORA = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
DEFAULT_HUB_CONFIG = "sample-10BT"

TEXT_ENDINGS = (".txt", ".md")
JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
PARQUET_ENDING = ".parquet"
FILE_ENDINGS = (*TEXT_ENDINGS, *JSONL_ENDINGS, PARQUET_ENDING)

Place = Any
"""Where a document begins, as a corpus understands it; made of what JSON knows."""


class Document(NamedTuple):
    """A text that is not empty, and valid Unicode.

    Attributes:
        text: its characters.
        place: from where on reading begins with this document; None where only an earlier one has such a place.
        replaced: whether bytes or surrogates that form no character were replaced by U+FFFD.
    """

    text: str
    place: Place | None = None
    replaced: bool = False


class Corpus(ABC):
    """Documents in a fixed order.

    Attributes:
        name: safe in file names; the shards' prefix.
        revision: changes when the content does.
    """

    name: str

    @functools.cached_property
    def revision(self) -> str:
        """Return what identifies the content."""
        return self._revision()

    def documents(self) -> Iterator[str]:
        """Yield the text of each document, from the first."""
        return (document.text for document in self.read())

    def read(self, start: Place | None = None) -> Iterator[Document]:
        """Yield the documents that are not empty, from the first, or from the place of one on.

        Raises:
            InputError: the source is broken, or holds no document.
        """
        empty = True
        for text, place, replaced in self._read(start):
            if text and not text.isspace():
                empty = False
                valid = _without_lone_surrogates(text)
                yield Document(valid, place, replaced or valid is not text)
        if empty and start is None:
            raise InputError(f"expected documents in the corpus '{self.name}', found none; give another --corpus")

    @abstractmethod
    def is_place(self, place: Place) -> bool:
        """Return whether a place, which a manifest has kept, is of this corpus's kind."""

    def share_before(self, place: Place) -> float | None:
        """Return how much of the corpus lies before a document's place, between 0 and 1; None where nobody knows."""
        return None

    def least_tokens(self) -> int | None:
        """Return a number of tokens that the corpus surely has, for a first look at the disk; None where unknown."""
        return None

    def can_go_on_from(self, revision: str) -> bool:
        """Return whether the corpus can be read as it was at `revision`, and from now on is."""
        return self.revision == revision

    @abstractmethod
    def _revision(self) -> str: ...

    @abstractmethod
    def _read(self, start: Place | None) -> Iterator[Document]: ...


def corpus_name(corpus: str) -> str:
    """Return the name that a corpus has in shards and manifest, whether or not it can be read here."""
    if corpus in (INSTALLED_DOCS, *HUB_CORPORA):
        return corpus
    name = Path(corpus).resolve().name
    endings = [ending for ending in FILE_ENDINGS if name.lower().endswith(ending)]
    stem = name.removesuffix(name[-len(max(endings, key=len)) :]) if endings else name
    # An underscore would blur NAME_val_000000.npy.
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "corpus"


class InstalledDocs(Corpus):
    """Documentation strings of the standard library and of the installed packages, gathered once."""

    name = INSTALLED_DOCS

    def __init__(self, *, num_workers: int | None = None) -> None:
        self._num_workers = num_workers

    def is_place(self, place: Place) -> bool:
        """Return whether a place is the number of a docstring."""
        return isinstance(place, int) and 0 <= place < len(self._docstrings)

    def share_before(self, place: Place) -> float | None:
        """Return the share of the docstrings that come before."""
        return place / len(self._docstrings)

    def _revision(self) -> str:
        return installed_revision(package_roots())

    @functools.cached_property
    def _docstrings(self) -> list[str]:
        return gather_docstrings(package_roots(), num_workers=self._num_workers)

    def _read(self, start: Place | None) -> Iterator[Document]:
        for number in range(start or 0, len(self._docstrings)):
            yield Document(self._docstrings[number], number)


def text_of(row: Any, text_field: str, place: str) -> str:
    """Return the text of a row, which stands at `place`; a null stands for an empty document.

    Raises:
        InputError: the row is no object, has no such field, or something else than text in it.
    """
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object in {place}, found {type(row).__name__}")
    if text_field not in row:
        raise no_field(text_field, list(row), place)
    text = row[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(
            f"expected text in the field '{text_field}' of {place}, found {type(text).__name__}; "
            "name another --text_field"
        )
    return text


def no_field(text_field: str, fields: list[str], place: str) -> InputError:
    """Return the error that names the fields there are."""
    there = ", ".join(fields) or "no field at all"
    return InputError(
        f"expected the field '{text_field}' in {place}, found {there}; name the field with --text_field"
        f"{did_you_mean(text_field, fields)}"
    )


def one_line(error: BaseException) -> str:
    """Return an error's message without line ends, cut where it gets long."""
    return " ".join(str(error).split())[:300]


def _without_lone_surrogates(text: str) -> str:
    """Return `text` with pairs of surrogates joined and lone ones as U+FFFD: JSON and Python escapes can write them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
