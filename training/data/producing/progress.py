"""Progress of the producer, with the time left where the size of the corpus is known."""

import time
from collections.abc import Callable

from common.durations import format_duration
from common.progress import Progress
from training.data.shards.manifest import Manifest

SECONDS_BETWEEN_REPORTS = 10.0


class ProducerProgress(Progress):
    """A bar of tokens on a terminal, log lines elsewhere; `tokens` are in the folder at the start."""

    def __init__(self, tokens: int, report: Callable[[str], None]) -> None:
        super().__init__(initial=tokens, unit="tokens", report=report, seconds_between_lines=SECONDS_BETWEEN_REPORTS)
        self._tokens = tokens
        self._start: tuple[float, float] | None = None  # time and fraction
        self._time_left = ""

    def show(self, manifest: Manifest, tokens: int, fraction: float | None) -> None:
        """Show the folder's manifest, the tokens so far, and the fraction of the work that is done, if known."""
        if fraction is not None:
            now = time.monotonic()
            self._start = self._start or (now, fraction)
            elapsed, done = now - self._start[0], fraction - self._start[1]
            if done > 0:
                self._time_left = f", {fraction:.0%}, {format_duration(elapsed * (1 - fraction) / done)} left"
        status = f"{len(manifest.shards)} shards, {manifest.documents:,} documents{self._time_left}"
        self.update(tokens - self._tokens, status)
        self._tokens = tokens
