"""Suggestions for misspelled names."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` with the known name closest to `name`, or an empty string if none is close."""
    closest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]}?" if closest else ""
