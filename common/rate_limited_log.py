"""Log lines at a limited rate."""

import time
from collections.abc import Callable


class RateLimitedLog:
    """Passes on the first line, then at most one every `seconds`; drops the others."""

    def __init__(self, seconds: float, log: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._log = log
        self._last: float | None = None

    def __call__(self, line: str) -> None:
        """Log `line`, unless another one was logged less than `seconds` ago."""
        now = time.monotonic()
        if self._last is None or now - self._last >= self._seconds:
            self._last = now
            self._log(line)
