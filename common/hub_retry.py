"""Waiting for the Hub: which errors pass by themselves, and how long to wait for that."""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.cli_errors import InputError
from common.rate_limited_log import AtMostEvery, spelled

Result = TypeVar("Result")

_SECONDS_BETWEEN_LINES = 60.0
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 60.0
_LONGEST_OUTAGE_SECONDS = 24 * 3600.0
ABOUT_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
)


def cache_refusal(error: BaseException) -> InputError | None:
    """Return what to tell of an error of the Hub's cache, which lies elsewhere than a run's folders; else None."""
    if not (isinstance(error, OSError) and error.errno in ABOUT_THE_DISK and isinstance(error.filename, str)):
        return None
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    if not Path(error.filename).is_relative_to(cache):
        return None
    return InputError(
        f"the cache of the Hub cannot be used ({error.filename}: {error.strerror}); free space, or let HF_HOME name a "
        "folder that can be written"
    )


def network_errors() -> tuple[type[BaseException], ...]:
    """Return what the Hub's clients raise when something is wrong with the network, whichever HTTP library they use."""
    from huggingface_hub.errors import HfHubHTTPError

    transports = [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, HfHubHTTPError, *transports)


def passes(error: BaseException) -> bool:
    """Return whether the same request may succeed later: 408, 429 and 5xx, time-outs, resets, no connection."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, OfflineModeIsEnabled) or "offline mode" in str(cause).lower() for cause in causes):
        return False
    if isinstance(error, LocalEntryNotFoundError):  # nothing in the cache, and the Hub could not be asked
        refusals = [cause for cause in causes[1:] if isinstance(cause, HfHubHTTPError)]
        return all(map(passes, refusals))
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status in (408, 429) or status >= 500
    if isinstance(error, EntryNotFoundError | FileNotFoundError):
        return False
    return not (isinstance(error, OSError) and error.errno in ABOUT_THE_DISK)


class Patience:
    """Waits between tries, longer each time up to a minute, and for a day in all; tells so once a minute.

    Args:
        what: is waited for.
        report: is given the lines.
        sleep: pauses for some seconds.
        clock: tells the seconds.
    """

    def __init__(
        self,
        what: str,
        report: Callable[[str], None],
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what = what
        self._sleep = sleep
        self._clock = clock
        self._say = AtMostEvery(_SECONDS_BETWEEN_LINES, report, clock=clock)
        self.relieved()

    def relieved(self) -> None:
        """Take note that the Hub answers again."""
        self._since: float | None = None
        self._delay = _FIRST_DELAY_SECONDS

    def wait(self, error: BaseException) -> None:
        """Wait before the next try, after `error`.

        Raises:
            InputError: the error will not pass by itself, or has not in a day.
            OSError: the error itself, where it is about the disk.
        """
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, OSError) and error.errno in ABOUT_THE_DISK:
            raise error
        now = self._clock()
        if self._since is None:
            self._since = now
        if not passes(error) or now - self._since > _LONGEST_OUTAGE_SECONDS:
            raise InputError(
                f"expected to read {self._what} from the Hub, found {told}; run the same command again when that is "
                "mended: finished shards are kept; --corpus installed-docs or a path needs no network"
            )
        self._say(
            f"{self._what} on the Hub cannot be reached since {spelled(now - self._since)} ({told}); "
            f"trying again in {self._delay:.0f} s"
        )
        self._sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY_SECONDS)

    def call(self, action: Callable[[], Result]) -> Result:
        """Return what `action` returns, however often it has to be tried.

        Raises:
            InputError: its error will not pass by itself, or has not in a day.
        """
        while True:
            try:
                result = action()
            except network_errors() as error:
                self.wait(error)
            else:
                self.relieved()
                return result
