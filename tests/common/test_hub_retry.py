"""Hub outages on a fake clock: which errors are retried, how long, and what is logged."""

import importlib
import importlib.util
import itertools
from typing import Any

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from support.fake_clock import Clock

from common.cli_errors import InputError
from common.hub_retry import HubRetry, is_transient, network_errors

# The Hub client's HTTP library: httpx2 since its release 2.
httpx: Any = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind(f"{status} from the server", response=httpx.Response(status, request=httpx.Request("GET", "http://x")))


@pytest.mark.parametrize(
    "error",
    [
        *(refusal(status) for status in (408, 429, 500, 502, 503, 504)),
        *(TimeoutError("timed out"), ConnectionResetError("reset by peer"), ConnectionError("Server Disconnected")),
        *(httpx.ConnectError("no route"), httpx.ReadTimeout("slow"), LocalEntryNotFoundError("nothing cached")),
    ],
    ids=repr,
)
def test_transient_errors_are_retried(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        *(refusal(status) for status in (400, 401, 403)),
        *(refusal(404, RepositoryNotFoundError), OfflineModeIsEnabled("offline mode"), FileNotFoundError("gone")),
        OSError(28, "No space left on device"),
        *(httpx.InvalidURL("Invalid port"), httpx.UnsupportedProtocol("no http://"), ImportError("no 'socksio'")),
    ],
    ids=repr,
)
def test_permanent_errors_are_not_retried(error: Exception) -> None:
    assert not is_transient(error)
    assert isinstance(error, network_errors())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("common.hub_retry.time", clock)
    monkeypatch.setattr("common.rate_limited_log.time", clock)
    return clock


def test_outage_of_hours_is_survived_with_a_line_a_minute(clock: Clock) -> None:
    lines: list[tuple[float, str]] = []
    retry = HubRetry("org/name", lambda line: lines.append((clock.now, line)), advice="")
    errors = iter([refusal(503)] * 500)

    def action() -> str:
        error = next(errors, None)
        if error is not None:
            raise error
        return "at last"

    assert retry.call(action) == "at last"
    assert clock.pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert clock.now > 8 * 3600
    assert all(later[0] - earlier[0] >= 60 for earlier, later in itertools.pairwise(lines))
    assert len(lines) > 400
    assert "the Hub has not answered for 2 h 00 min while reading org/name (HfHubHTTPError: 503" in " ".join(
        line for _, line in lines
    )
    retry.wait(refusal(503))
    assert clock.pauses[-1] == 1  # a new outage begins with short pauses


def test_outage_of_more_than_a_day_is_an_error(clock: Clock) -> None:
    retry = HubRetry("org/name", lambda line: None, advice="run again")

    def action() -> None:
        raise refusal(503)

    with pytest.raises(InputError, match=r"cannot read org/name from the Hub \(HfHubHTTPError: 503 .*; run again"):
        retry.call(action)
    assert 24 * 3600 < clock.now < 25 * 3600


def test_full_disk_is_not_retried() -> None:
    with pytest.raises(OSError, match="No space left"):
        HubRetry("org/name", lambda line: None, advice="").wait(OSError(28, "No space left on device"))
