"""The rows of a .json file, which is an array or an object with one: memory holds one row at a time."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from training.data.sources.formats import Member

_BLOCK_CHARACTERS = 1 << 16
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def json_items(text: io.TextIOBase, file: Path | Member) -> Iterator[Any]:
    """Yield the items of a JSON array, or of the first array of objects in an object.

    Raises:
        InputError: the file is not valid JSON, or has no such array.
    """
    reader = _Reader(text, file)
    if reader.next_character() == "[":
        yield from reader.items("[]")
        return
    found = False
    for _ in reader.items("{}"):
        if found or reader.next_character() != "[":
            reader.value()
            continue
        for item in reader.items("[]"):
            if isinstance(item, dict):  # otherwise an array of something else, next to the rows
                found = True
                yield item
    if not found:
        raise InputError(
            f"{file} holds no rows: expected an array of objects, an object with one, or an object per line"
        )


class _Reader:
    """Takes one JSON value after the other from a text."""

    def __init__(self, text: io.TextIOBase, file: Path | Member) -> None:
        self._text, self._file = text, file
        self._decoder = json.JSONDecoder()
        self._buffer, self._start = "", 0

    def next_character(self) -> str:
        """Return the first character after white space, which stays; nothing at the end."""
        while True:
            match = _WHITE_SPACE.match(self._buffer, self._start)
            self._start = match.end() if match else self._start
            if self._start < len(self._buffer) or not self._grow():
                return self._buffer[self._start : self._start + 1]

    def value(self) -> Any:
        """Take the value that comes next."""
        self.next_character()
        while True:
            try:
                item, end = self._decoder.raw_decode(self._buffer, self._start)
            except (ValueError, RecursionError) as error:
                if not self._grow():
                    raise InputError(f"{self._file} is not valid JSON ({error})") from None
                continue
            if end < len(self._buffer) or not self._grow():  # a number may continue
                self._start = end
                return item

    def items(self, brackets: str) -> Iterator[Any]:
        """Take an array, item by item, or an object, key by key; then the caller takes the values."""
        opening, closing = brackets[0], brackets[1]
        self._take(opening)
        while self.next_character() != closing:
            item = self.value()
            if opening == "{":
                self._take(":")
            yield item
            if self.next_character() != closing:
                self._take(",")
        self._take(closing)

    def _take(self, expected: str) -> None:
        if (found := self.next_character()) != expected:
            raise InputError(f"{self._file} is not valid JSON: expected {expected}, found {found or 'its end'}")
        self._start += 1

    def _grow(self) -> bool:
        """Append as much text again, without what was taken; return whether there is more."""
        self._buffer, self._start = self._buffer[self._start :], 0
        more = self._text.read(max(_BLOCK_CHARACTERS, len(self._buffer)))
        self._buffer += more
        return bool(more)
