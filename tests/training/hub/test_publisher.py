"""Pushes in the background: successful, delayed and failed ones."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.background import wait_until

from training.hub import publisher as publisher_module
from training.hub.publisher import Publisher
from training.monitoring.run_history import RunHistory


class Hub:
    """Accepts pushes while it is open, and raises the given errors first."""

    def __init__(self) -> None:
        self.pushed: list[int] = []
        self.lines: list[str] = []
        self.errors: list[Exception] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        self.open.set()

    def push(self, folder: Path, step: int) -> str:
        self.entered.set()
        assert self.open.wait(20)
        assert folder.is_dir()
        if self.errors:
            raise self.errors.pop(0)
        self.pushed.append(step)
        return f"pushed {step}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.open.set()


@pytest.fixture
def publisher(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publisher:
    run: Any = SimpleNamespace(output_dir=tmp_path, resume_from=None, report=hub.lines.append)
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE_SECONDS", 0.01)
    publisher = Publisher(run, "me/x", RunHistory())
    monkeypatch.setattr(publisher, "_push", hub.push)
    return publisher


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


Make = Callable[[str], Path]


def test_one_push_at_a_time_and_the_newest_wins(hub: Hub, publisher: Publisher, folder: Make) -> None:
    a, b, c = folder("a"), folder("b"), folder("c")
    hub.open.clear()
    publisher.submit(a, 1)
    assert hub.entered.wait(20)
    publisher.submit(b, 2)
    publisher.submit(c, 3)
    assert not b.exists()
    hub.open.set()
    assert publisher.stop(20)
    assert hub.pushed == [1, 3]
    assert not a.exists()
    assert not c.exists()
    assert hub.lines == ["pushed 1", "pushed 3"]


def test_a_failed_push_is_logged_and_retried(hub: Hub, publisher: Publisher, folder: Make) -> None:
    hub.errors = [ConnectionError("reset"), TimeoutError("slow")]
    publisher.submit(folder("a"), 1)
    assert publisher.stop(20)
    assert hub.pushed == [1]
    assert [line.split(":")[0] for line in hub.lines[:2]] == ["the push of step 1 failed"] * 2


def test_the_pause_is_as_long_as_the_hub_asks_for(
    hub: Hub, publisher: Publisher, folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.errors = [ConnectionError("limited")]
    monkeypatch.setattr(publisher_module, "retry_after", lambda error: 7200.0)
    publisher.submit(folder("a"), 1)
    wait_until(lambda: bool(hub.lines))
    assert hub.lines == ["the push of step 1 failed: ConnectionError: limited, retry in 1 h 00 min"]  # an hour at most
    assert publisher.stop(20)
    assert hub.pushed == [1]


def test_a_slow_push_is_reported_when_the_next_one_comes(
    hub: Hub, publisher: Publisher, folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "_SLOW_PUSH_SECONDS", 0.0)
    hub.open.clear()
    publisher.submit(folder("a"), 1)
    assert hub.entered.wait(20)
    assert hub.lines == []
    publisher.submit(folder("b"), 2)
    assert hub.lines == ["the push of step 1 has taken 0 s; step 2 waits"]
    hub.open.set()
    assert publisher.stop(20)


def test_a_newer_folder_replaces_one_that_failed(
    hub: Hub, publisher: Publisher, folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "FIRST_PAUSE_SECONDS", 30.0)
    hub.errors = [ConnectionError("reset")]
    a = folder("a")
    publisher.submit(a, 1)
    wait_until(lambda: bool(hub.lines))
    publisher.submit(folder("b"), 2)
    assert not a.exists()
    assert publisher.stop(20)  # the end of the run cuts the pause short
    assert hub.pushed == [2]


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        pytest.param(("FIRST_PAUSE_SECONDS", 30.0), ValueError("Invalid metadata"), id="error that no retry fixes"),
        pytest.param(("retry_after", lambda error: 3600.0), ConnectionError("limited"), id="rate limit beyond it"),
    ],
)
def test_the_end_does_not_wait_past_its_deadline(
    hub: Hub,
    publisher: Publisher,
    folder: Make,
    monkeypatch: pytest.MonkeyPatch,
    setting: tuple[str, Any],
    error: Exception,
) -> None:
    monkeypatch.setattr(publisher_module, *setting)
    hub.errors = [error] * 3
    publisher.submit(folder("a"), 1)
    wait_until(lambda: bool(hub.lines))
    started = time.monotonic()
    assert not publisher.stop(25)
    assert time.monotonic() - started < 20
    assert len(hub.errors) == 1  # one attempt before the end, and one at it


def test_the_end_does_not_wait_for_a_hanging_push_and_logs_nothing_after_it(
    hub: Hub, publisher: Publisher, folder: Make
) -> None:
    hub.open.clear()
    a = folder("a")
    publisher.submit(a, 1)
    assert hub.entered.wait(20)
    assert not publisher.stop(0.05)
    hub.open.set()
    wait_until(lambda: not a.exists())
    assert hub.lines == []
