"""Outages of the Hub, on a clock of our own: what is waited for, how long, and what is told."""

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
from support.own_clock import Clock

from common.cli_errors import InputError
from common.hub_retry import Patience, passes

# What the Hub's client speaks HTTP with: httpx2 since its release 2.
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
def test_what_passes_by_itself_is_waited_for(error: Exception) -> None:
    assert passes(error)


@pytest.mark.parametrize(
    "error",
    [
        *(refusal(status) for status in (400, 401, 403)),
        *(refusal(404, RepositoryNotFoundError), OfflineModeIsEnabled("offline mode"), FileNotFoundError("gone")),
        OSError(28, "No space left on device"),
    ],
    ids=repr,
)
def test_what_does_not_pass_by_itself_is_not_waited_for(error: Exception) -> None:
    assert not passes(error)


def test_outage_of_hours_is_waited_for_with_a_line_a_minute() -> None:
    clock, lines = Clock(), []
    patience = Patience("org/name", lambda line: lines.append((clock.now, line)), sleep=clock.sleep, clock=clock)
    tries = iter([refusal(503)] * 500)

    def action() -> str:
        error = next(tries, None)
        if error is not None:
            raise error
        return "at last"

    assert patience.call(action) == "at last"
    assert clock.pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert clock.now > 8 * 3600
    assert all(later[0] - earlier[0] >= 60 for earlier, later in itertools.pairwise(lines))
    assert len(lines) > 400
    assert "org/name on the Hub cannot be reached since 2.0 h (HfHubHTTPError: 503" in " ".join(
        line for _, line in lines
    )
    patience.wait(refusal(503))
    assert clock.pauses[-1] == 1  # a new outage begins with short pauses


def test_outage_of_more_than_a_day_is_given_up() -> None:
    clock = Clock()
    patience = Patience("org/name", lambda line: None, sleep=clock.sleep, clock=clock)

    def action() -> None:
        raise refusal(503)

    with pytest.raises(InputError, match=r"expected to read org/name from the Hub.*finished shards are kept"):
        patience.call(action)
    assert 24 * 3600 < clock.now < 25 * 3600


def test_full_disk_is_not_taken_for_the_network() -> None:
    with pytest.raises(OSError, match="No space left"):
        Patience("org/name", lambda line: None).wait(OSError(28, "No space left on device"))
