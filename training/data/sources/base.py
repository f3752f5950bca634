"""A corpus: documents in a fixed order, read from the start or from a known position.

Three kinds: documentation strings of the installed packages (no download), files and folders, and Hub datasets.
Files and Hub datasets are streamed: memory holds a row group, a line or a piece of a text file at a time.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.cli_errors import InputError
from training.data.sources.formats import ending_of
from training.data.sources.pieces import pieces_of

INSTALLED_DOCS = "installed-docs"
HUB_CORPORA = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
DEFAULT_HUB_CONFIG = "sample-10BT"

Position = Any
"""Where a document begins; each kind of corpus has its own form, which JSON can represent."""


class Piece(NamedTuple):
    """A part of a document that is not blank, in valid Unicode; most documents are one piece.

    Attributes:
        position: where reading can start at this piece; None where the corpus has no position for it.
        starts: whether the document begins here.
        replaced: characters that stand for invalid bytes or lone surrogates, now U+FFFD.
    """

    text: str
    position: Position = None
    starts: bool = True
    replaced: int = 0


class Corpus(ABC):
    """Documents in a fixed order; its name is the prefix of the shards' file names."""

    name: str

    @property
    @abstractmethod
    def revision(self) -> str:
        """Return an identifier of the content."""

    @abstractmethod
    def _read(self, start: Position | None) -> Iterator[Piece]:
        """Yield documents, in pieces where they are long; invalid bytes are lone surrogates (`text_files.INVALID`)."""

    def at_revision(self, revision: str) -> "Corpus | None":
        """Return the corpus with the content it had at `revision`, or None if that content no longer exists."""
        return self if self.revision == revision else None

    def holds(self, revision: str) -> bool:
        """Return whether the content at `revision` is this corpus's, or was and can still be read.

        Raises:
            InputError: the corpus cannot be reached, so that it is unknown.
        """
        return self.revision == revision

    def notes(self) -> list[str]:
        """Return what a user should know before the corpus is read, a line each."""
        return []

    def fraction_before(self, position: Position) -> float | None:
        """Return the fraction of the corpus that lies before a position, in [0, 1]; None where unknown."""
        return None

    def min_tokens(self) -> int | None:
        """Return a lower bound on the number of tokens, for checking disk space; None where unknown."""
        return None

    def describe(self, position: Position) -> str:
        """Return a position in words, for messages."""
        return f"{self.name} at {position}"

    def read(self, start: Position | None = None) -> Iterator[Piece]:
        """Yield the pieces of the documents that are not blank, from the first or from a position.

        Raises:
            InputError: the source is corrupted, or holds no document.
        """
        empty, blank = True, False
        for document in self._read(start):
            if document.starts:
                blank = not document.text or document.text.isspace()
            if blank:
                continue
            empty = False
            text = _replace_lone_surrogates(document.text)
            replaced = 0 if text is document.text else text.count("\ufffd") - document.text.count("\ufffd")
            for number, part in enumerate(pieces_of(text)):
                yield Piece(part, starts=False) if number else document._replace(text=part, replaced=replaced)
        if empty and start is None:
            raise InputError(f"corpus '{self.name}' holds no documents; pass another --corpus")


def corpus_name(corpus: str) -> str:
    """Return the name of a corpus in shards and manifest; the corpus need not exist here."""
    if corpus in (INSTALLED_DOCS, *HUB_CORPORA):
        return corpus
    name = Path(corpus).resolve().name
    stem = name[: len(name) - len(ending_of(name))]
    # An underscore would make NAME_val_000000.npy ambiguous.
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "corpus"


def _replace_lone_surrogates(text: str) -> str:
    """Join pairs of surrogates and replace lone ones by U+FFFD; escapes in JSON and Python can produce both."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
