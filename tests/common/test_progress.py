"""The display of progress: a bar on a terminal, lines in a log, nothing on other ranks."""

import io
import time

import pytest

import common.progress
from common.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_bar_with_the_status() -> None:
    stream = Terminal()
    lines: list[str] = []
    with Progress(total=3, description="hellaswag", stream=stream, report=lines.append) as progress:
        for done in range(3):
            progress.update(status=f"acc {done}")
    assert "hellaswag" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "acc 2" in stream.getvalue()
    assert lines == []


def test_terminal_shows_the_status_below_the_bar() -> None:
    stream = Terminal()
    with Progress(total=2, bar_format="step {n_fmt}/{total_fmt}{desc}", status_below=True, stream=stream) as progress:
        progress.describe("  5 s left")
        time.sleep(0.15)  # tqdm draws at most every 0.1 s
        progress.update(2, status="loss 3.0000")
    assert "step 2/2  5 s left" in stream.getvalue()
    assert "\nloss 3.0000" in stream.getvalue().replace("\r", "")


def test_two_lines_disappear_at_the_end_so_that_nothing_is_left_below_the_last_message() -> None:
    stream = Terminal()
    with Progress(total=2, bar_format="{n_fmt}/{total_fmt}", status_below=True, stream=stream) as progress:
        progress.update(1, status="loss 3.0000")
        progress.update(1, status="loss 2.0000")
        stream.truncate(0)
    assert not stream.getvalue().strip(" \r\n\0\x1b[A")


def test_log_gets_a_line_at_most_every_interval_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(common.progress.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    with Progress(total=3, description="hellaswag", stream=io.StringIO(), report=lines.append) as progress:
        for seconds, status in ((20, "acc 1"), (20, "acc 0.5"), (5, None)):
            now[0] += seconds
            progress.update(status=status)
    assert lines == ["hellaswag: 2 of 3 items, acc 0.5", "hellaswag: 3 of 3 items, acc 0.5"]


def test_log_has_the_rate_where_the_total_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(common.progress.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    progress = Progress(
        initial=500, unit="tokens", stream=io.StringIO(), report=lines.append, seconds_between_lines=10.0
    )
    now[0] = 10.0
    progress.update(20_000, status="2 shards")
    assert lines == ["20,500 tokens at 2,000 per second, 2 shards"]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_disabled_progress_shows_nothing(stream: io.StringIO) -> None:
    lines: list[str] = []
    with Progress(total=3, enabled=False, stream=stream, report=lines.append, status_below=True) as progress:
        progress.update(status="acc 1")
    assert stream.getvalue() == ""
    assert lines == []
