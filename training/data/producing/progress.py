"""Progress of the producer: a bar on a terminal, elsewhere a log line now and then."""

import sys
import time
from collections.abc import Callable

from common.durations import format_duration

SECONDS_BETWEEN_REPORTS = 10.0


class Progress:
    """How far a producer is; a context manager.

    Args:
        tokens: in the folder when this run of the producer began.
        report: is given the lines, where there is no terminal.
    """

    def __init__(self, *, tokens: int, report: Callable[[str], None]) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            initial=tokens,
            unit=" tokens",
            unit_scale=True,
            smoothing=0,  # the rate of the whole run
            disable=not sys.stderr.isatty(),
        )
        self._report = report
        self._started = self._reported = time.perf_counter()
        self._first_tokens = tokens
        self._first_share: float | None = None
        self._share: float | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, *, tokens: int, documents: int, shards: int, share: float | None) -> None:
        """Show how far the folder is.

        Args:
            tokens: in it, and on their way into it.
            documents: that begin in its whole shards.
            shards: that are whole.
            share: of all there is to do, between 0 and 1; None where nothing new is known.
        """
        now = time.perf_counter()
        self._share = share = self._share if share is None else share
        if share is not None and self._first_share is None:
            self._first_share = share
        left = ""
        if share is not None and self._first_share is not None and share > self._first_share:
            seconds = (now - self._started) * (1 - share) / (share - self._first_share)
            left = f"{share:.0%}, {format_duration(seconds)} left"
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{shards} shards, {documents:,} documents, {left}", refresh=False)
            self._bar.update(tokens - self._bar.n)
        elif now - self._reported >= SECONDS_BETWEEN_REPORTS:
            self._reported = now
            rate = (tokens - self._first_tokens) / (now - self._started)
            self._report(
                f"{tokens:,} tokens at {rate:,.0f} a second, {shards} shards with {documents:,} documents"
                + (f", {left}" if left else "")
            )
