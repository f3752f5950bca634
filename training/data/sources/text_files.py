"""Text files, decoded in blocks and cut into documents and pieces: memory does not grow with the file."""

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from common.cli_errors import InputError
from training.data.sources.base import Piece
from training.data.sources.formats import Member, advance
from training.data.sources.pieces import piece_end

END_OF_TEXT = "<|endoftext|>"

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 4096
_BYTE_ORDER_MARKS = {  # UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NOT_TEXT = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\0": "compressed with xz",
    b"PK\3\4": "a zip archive or an office document",
    b"%PDF-": "a PDF",
    b"PAR1": "Parquet",
}
_SPACES_AFTER_A_MARK = 16

INVALID = "training.invalid"
"""Error handler of decoders: a lone surrogate for invalid bytes, which `Corpus.read` counts and replaces."""
codecs.register_error(INVALID, lambda error: ("\udfff", error.end))  # type: ignore[attr-defined]


def find_encoding(stream: io.BufferedReader, encoding: str | None) -> tuple[str, int]:
    """Return the encoding of an opened text file and the bytes of its byte-order mark; nothing is read yet.

    The mark decides, then `encoding`, else it is UTF-8. UTF-16 without a mark is recognized by its NUL bytes.
    """
    head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    for mark, found in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return found, len(mark)
    if encoding is not None:
        name = codecs.lookup(encoding).name
        return {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(name, name), 0
    even, odd, pairs = head[::2].count(0), head[1::2].count(0), len(head) // 2
    if odd > 0.4 * pairs and even < 0.1 * pairs:
        return "utf-16-le", 0
    if even > 0.4 * pairs and odd < 0.1 * pairs:
        return "utf-16-be", 0
    return "utf-8", 0


def _require_text(stream: io.BufferedReader, codec: str, file: Path | Member) -> None:
    """Raise an `InputError` for NUL bytes in UTF-8, or the beginning of another kind of file; nothing is read yet."""
    head = stream.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    for start, kind in _NOT_TEXT.items():
        if head.startswith(start):
            raise InputError(f"{file} is {kind}, not text; rename it to its real ending, or remove it from the corpus")
    if codec == "utf-8" and head.count(0) > 0.01 * len(head):
        raise InputError(
            f"{file} holds NUL bytes, so it is not text in UTF-8; name its encoding with --encoding, such as "
            "utf-16-le, or remove it from the corpus"
        )


def check_encoding(encoding: str | None) -> None:
    """Raise an `InputError` if Python does not know a text encoding of this name."""
    try:
        if encoding is not None:
            "".encode(encoding)
    except LookupError:
        raise InputError(f"unknown encoding '{encoding}'; give one that Python knows, such as cp1252") from None


class Separator:
    """What separates documents in a text file: a line that holds nothing else, or a text with line breaks.

    Attributes:
        characters: the most characters that a separator has.
    """

    def __init__(self, separator: str | None) -> None:
        text = (separator or "").replace("\\n", "\n").replace("\\t", "\t")
        escaped = re.escape(text).replace("\\\n", "\r?\n")
        line = rf"{escaped}[ \t]{{0,{_SPACES_AFTER_A_MARK}}}(?:\r?\n|\Z)"
        self.characters = 2 * len(text) + _SPACES_AFTER_A_MARK + 4
        self._at_start = re.compile(escaped if "\n" in text else line) if text else None
        self._inside = re.compile(escaped if "\n" in text else rf"\r?\n{line}") if text else None

    def after(self, text: str, *, starts: bool, end: int) -> tuple[int, int] | None:
        """Return the bounds of the first separator that begins in text[:end + 1]; `starts` at a document's beginning.

        One that ends with `text` may be incomplete.
        """
        if self._inside is None or self._at_start is None:
            return None
        found = self._at_start.match(text) if starts else None
        found = found or self._inside.search(text, 0, min(len(text), end + 2 * self.characters))
        return found.span() if found is not None and found.start() <= end else None


class _Window:
    """The text from the current piece on, and the file offsets of the blocks that it was decoded from."""

    def __init__(self, stream: BinaryIO, encoding: str, offset: int) -> None:
        self.text = ""
        self.complete = False
        self._stream, self._read = stream, offset
        self._decoder = codecs.getincrementaldecoder(encoding)(INVALID)
        self._blocks = [(0, offset)]  # (index in the text, offset in the file), the last one before the piece first

    @property
    def position(self) -> tuple[int, int]:
        """Return the offset of a block, and how many characters after its beginning the text begins."""
        begin, offset = self._blocks[0]
        return offset, -begin

    def grow(self) -> None:
        """Append the next block."""
        block = self._stream.read(_BLOCK_BYTES)
        self.complete = not block
        self._read += len(block)
        self.text += self._decoder.decode(block, final=self.complete)
        waiting, state = self._decoder.getstate()
        if state == 0:  # decoding can start here
            self._blocks.append((len(self.text), self._read - len(waiting)))

    def drop(self, characters: int) -> None:
        """Remove characters from the beginning."""
        self.text = self.text[characters:]
        self._blocks = [(begin - characters, offset) for begin, offset in self._blocks]
        while len(self._blocks) > 1 and self._blocks[1][0] <= 0:
            del self._blocks[0]


def read_text(
    stream: Any, file: Path | Member, separator: Separator, encoding: str | None, position: Sequence[int] = ()
) -> Iterator[Piece]:
    """Yield the pieces of an opened text file, from the beginning or a position: see `read_pieces`.

    Raises:
        InputError: it is no text, in this encoding.
    """
    codec, mark_bytes = find_encoding(stream, encoding)
    _require_text(stream, codec, file)
    offset, *rest = position or (0,)
    offset = max(offset, mark_bytes)
    advance(stream, offset)
    yield from read_pieces(stream, codec, separator, offset, *rest)


def read_pieces(
    stream: BinaryIO, encoding: str, separator: Separator, offset: int, skipped: int = 0, inside: int = 0
) -> Iterator[Piece]:
    """Yield the pieces of the text that follows in a stream, which is at byte `offset`, after `skipped` characters.

    The position of a piece is [offset, skipped], or [offset, skipped, 1] `inside` a document.
    """
    starts = not inside
    window = _Window(stream, encoding, offset)
    while len(window.text) < skipped and not window.complete:
        window.grow()
    window.drop(skipped)
    while window.text or not window.complete:
        bounds = _next_cut(window.text, separator, starts=starts, complete=window.complete)
        if bounds is None:
            window.grow()
            continue
        end, following = bounds
        if end:
            yield Piece(window.text[:end], [*window.position, *([] if starts else [1])], starts)
        window.drop(following)
        starts = following > end


def _next_cut(text: str, separator: Separator, *, starts: bool, complete: bool) -> tuple[int, int] | None:
    """Return where the first piece of `text` ends and the next one begins; None where that depends on later text."""
    if not complete and len(text) < separator.characters:
        return None
    end = piece_end(text, 0, complete=complete)
    bounds = separator.after(text, starts=starts, end=len(text) if end is None else end)
    bounds = bounds or (None if end is None else (end, end))
    uncertain = bounds is not None and not complete and bounds[1] + separator.characters > len(text)
    return None if uncertain else bounds
