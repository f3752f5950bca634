"""Retries while the Hugging Face Hub is unavailable: which errors are transient, and how long to wait."""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common.cli_errors import InputError, TemporaryError, one_line
from common.durations import format_duration
from common.rate_limited_log import RateLimitedLog

Result = TypeVar("Result")

_SECONDS_BETWEEN_LINES = 60.0
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 60.0
_LONGEST_OUTAGE_SECONDS = 24 * 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def is_disk_error(error: BaseException) -> bool:
    """Return whether the disk is full or a path cannot be written."""
    return isinstance(error, OSError) and error.errno in (*_FULL, *_NOT_WRITABLE)


def disk_error_kind(error: OSError) -> type[InputError]:
    """Return the kind of a disk error: a full disk may get space again, but not a path the right to be written."""
    return TemporaryError if error.errno in _FULL else InputError


def hub_cache_error(error: BaseException) -> InputError | None:
    """Return an `InputError` if `error` is about writing to the Hub's local cache, else None."""
    if not (isinstance(error, OSError) and is_disk_error(error) and isinstance(error.filename, str)):
        return None
    default = f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"
    folders = {name: os.environ.get(name, "") for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE")}
    for variable, folder in {**folders, "HF_HOME": os.environ.get("HF_HOME", default)}.items():
        # `Path.expanduser` fails for a user without a home.
        if folder and Path(error.filename).is_relative_to(os.path.expanduser(folder)):  # noqa: PTH111
            return disk_error_kind(error)(
                f"cannot write to the Hugging Face cache ({error.filename}: {error.strerror}); free space, or set "
                f"{variable} to a writable folder"
            )
    return None


def network_errors() -> tuple[type[BaseException], ...]:
    """Return the exceptions that the Hub's clients raise for network problems, whichever HTTP library they use."""
    from huggingface_hub.errors import HfHubHTTPError

    transports = [sys.modules[name].TransportError for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, HfHubHTTPError, *transports, *_setting_errors())


def _setting_errors() -> tuple[type[BaseException], ...]:
    """What the clients raise for a proxy or an endpoint that is no URL, or a SOCKS proxy without its package."""
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (ImportError, *(kind for client in clients for kind in (client.InvalidURL, client.UnsupportedProtocol)))


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed: after 408, 429, 5xx, a timeout, a reset or a failed connection."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, _setting_errors()) for cause in causes):
        return False
    if any(isinstance(cause, OfflineModeIsEnabled) or "offline mode" in str(cause).lower() for cause in causes):
        return False
    if isinstance(error, LocalEntryNotFoundError):  # not in the cache, and the request to the Hub failed
        return all(is_transient(cause) for cause in causes[1:] if isinstance(cause, HfHubHTTPError))
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status in (408, 429) or status >= 500
    if isinstance(error, EntryNotFoundError | FileNotFoundError):
        return False
    return not is_disk_error(error)


class HubRetry:
    """Retries with exponential backoff, at most a minute between attempts and a day in all.

    `log` receives a line a minute during an outage, which ends with `note`; `advice` is what to do when retrying is
    pointless.
    """

    def __init__(self, repository: str, log: Callable[[str], None], *, advice: str, note: str = "") -> None:
        self._repository = repository
        self._advice, self._note = advice, note
        self._log = RateLimitedLog(_SECONDS_BETWEEN_LINES, log)
        self.reset()

    def reset(self) -> None:
        """Forget the outage: the last request succeeded."""
        self._outage_began: float | None = None
        self._delay = _FIRST_DELAY_SECONDS

    def wait(self, error: BaseException) -> None:
        """Sleep before the next attempt after `error`.

        Raises:
            InputError: the error is not transient, or the outage has lasted a day.
            OSError: `error` itself, if it is about the disk.
        """
        if is_disk_error(error):
            raise error
        now = time.monotonic()
        if self._outage_began is None:
            self._outage_began = now
        outage_seconds = now - self._outage_began
        reason = f"{type(error).__name__}: {one_line(error)}"
        if not is_transient(error) or outage_seconds > _LONGEST_OUTAGE_SECONDS:
            kind = TemporaryError if is_transient(error) else InputError
            raise kind(f"cannot read {self._repository} from the Hub ({reason}); {self._advice}")
        self._log(
            f"the Hub has not answered for {format_duration(outage_seconds)} while reading {self._repository} "
            f"({reason}); retrying in {self._delay:.0f} s{self._note}"
        )
        time.sleep(self._delay)
        self._delay = min(2 * self._delay, _LONGEST_DELAY_SECONDS)

    def call(self, action: Callable[[], Result]) -> Result:
        """Return the result of `action`, retried while its errors are transient; errors as of `wait`."""
        while True:
            try:
                result = action()
            except network_errors() as error:
                self.wait(error)
            else:
                self.reset()
                return result
