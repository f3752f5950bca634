"""The pieces of a corpus in batches for the tokenizing processes, and what the manifest says about the text in them."""

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from training.data.shards.manifest import Manifest, ResumePoint
from training.data.sources.base import Corpus, Piece, Position

CHARACTERS_PER_BATCH = 1 << 18
PIECES_PER_BATCH = 1024
_EXCERPT = 20  # characters on each side


class Finding(NamedTuple):
    """Unusual characters in a piece: U+FFFD for invalid bytes, and special tokens that the text spells.

    Attributes:
        number: which piece of a batch.
        position: of the piece, or of one before it.
        excerpt: the text around the first U+FFFD.
    """

    number: int
    document: int
    position: Position | None
    replaced: int
    special_tokens: int
    excerpt: str


@dataclass
class Batch:
    """Pieces that are encoded together, the first one in the document of index `document`, at `position`."""

    document: int
    position: Position | None
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    characters: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Return whether the batch is large enough to encode."""
        return self.characters >= CHARACTERS_PER_BATCH or len(self.pieces) >= PIECES_PER_BATCH


def joined(pieces: Iterable[Piece], can_cut: Callable[[str, str], bool]) -> Iterator[Piece]:
    """Yield the pieces, joined where their tokenizer cannot be cut."""
    parts: list[Piece] = []
    for piece in itertools.chain(pieces, [None]):
        if parts and (piece is None or piece.starts or can_cut(parts[-1].text, piece.text)):
            text, replaced = "".join(part.text for part in parts), sum(part.replaced for part in parts)
            yield parts[0]._replace(text=text, replaced=replaced)
            parts.clear()
        if piece is not None:
            parts.append(piece)


def batches(pieces: Iterable[Piece], document: int, special_tokens: "re.Pattern[str] | None" = None) -> Iterator[Batch]:
    """Yield the pieces in batches; each begins at a position if it can.

    Args:
        document: index of the document that the first piece belongs to.
        special_tokens: what is counted in the text.
    """
    batch, position = None, None
    for number, piece in enumerate(pieces):
        document += piece.starts and number > 0
        position = position if piece.position is None else piece.position
        if batch is None or batch.full or (batch.position is None and piece.position is not None):
            if batch is not None:
                yield batch
            batch = Batch(document, piece.position)
        spelled = len(special_tokens.findall(piece.text)) if special_tokens else 0
        if piece.replaced or spelled:
            at = max(0, piece.text.find("\ufffd"))
            excerpt = " ".join(piece.text[max(0, at - _EXCERPT) : at + _EXCERPT].split())
            batch.findings.append(Finding(len(batch.pieces), document, position, piece.replaced, spelled, excerpt))
        batch.pieces.append((piece.text, piece.starts))
        batch.characters += len(piece.text)
    if batch is not None:
        yield batch


class CorpusProgress:
    """The state of the corpus after each shard, for the manifest: where to resume, and what was found in the text."""

    def __init__(self, corpus: Corpus, manifest: Manifest) -> None:
        self._corpus = corpus
        self._tokens = manifest.tokens
        names = ("replaced_documents", "replaced_characters", "special_tokens_in_text", "first_replaced", "resume")
        self._values: dict[str, Any] = {name: getattr(manifest, name) for name in names}
        self._last_replaced: int | None = None
        self._pending: deque[tuple[int, ResumePoint | Finding]] = deque()  # by token

    def add(self, batch: Batch, first_token: int, lengths: np.ndarray) -> None:
        """Register the batch that the writer gets next: its first token's index, and the tokens of each piece."""
        if batch.position is not None:
            self._pending.append((first_token, ResumePoint(batch.document, batch.position, first_token)))
        tokens = first_token + np.cumsum(lengths) - lengths
        for finding in batch.findings:
            if tokens[finding.number] >= self._tokens:  # otherwise the manifest has it
                self._pending.append((int(tokens[finding.number]), finding))
        batch.pieces.clear()

    def at_shard_end(self, tokens: int) -> dict[str, Any]:
        """Return the manifest's new values when `tokens` tokens are in complete shards."""
        while self._pending and self._pending[0][0] < tokens:
            _, event = self._pending.popleft()
            if isinstance(event, ResumePoint):
                self._values["resume"] = event
                continue
            self._values["replaced_characters"] += event.replaced
            self._values["special_tokens_in_text"] += event.special_tokens
            if event.replaced:
                self._values["replaced_documents"] += event.document != self._last_replaced
                self._last_replaced = event.document
                if self._values["first_replaced"] is None:
                    self._values["first_replaced"] = f'{self._corpus.describe(event.position)}: "{event.excerpt}"'
        self._tokens = tokens
        return dict(self._values)


def summary(manifest: Manifest) -> Iterator[str]:
    """Yield what a user should know about the text in the shards, a line each."""
    if count := manifest.replaced_documents:
        yield (
            f"{count:,} document{'s' if count > 1 else ''} held invalid {manifest.encoding or 'UTF-8'}, which was "
            f"replaced by U+FFFD: {manifest.replaced_characters:,} characters, the first in {manifest.first_replaced}"
        )
    if manifest.special_tokens_in_text:
        yield (
            f"the text spells special tokens such as <|endoftext|> {manifest.special_tokens_in_text:,} times inside "
            f"its lines; they are encoded as {'plain text' if manifest.split_special_tokens else 'these tokens'} "
            f"(split_special_tokens {str(manifest.split_special_tokens).lower()})"
        )
