"""Pushing behind training, with pushes that a test lets through, holds up or breaks."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training.hub.pusher import Pusher
from training.hub.staging import stage

A, B, C = Path("a"), Path("b"), Path("c")


class Taker:
    """Takes what is pushed, when it is let."""

    def __init__(self) -> None:
        self.pushed: list[tuple[Path, int]] = []
        self.dropped: list[Path] = []
        self.lines: list[str] = []
        self.errors: list[Exception] = []
        self.open = threading.Event()
        self.entered = threading.Event()
        self.open.set()

    def push(self, folder: Path, step: int) -> str:
        self.entered.set()
        assert self.open.wait(20)
        if self.errors:
            raise self.errors.pop(0)
        self.pushed.append((folder, step))
        return f"pushed {step}"


@pytest.fixture
def taker() -> Iterator[Taker]:
    hub = Taker()
    yield hub
    hub.open.set()


def pusher(hub: Taker, may_pass: Callable[[BaseException], bool] = lambda error: True, **options: Any) -> Pusher:
    return Pusher(
        hub.push,
        drop=hub.dropped.append,
        say=hub.lines.append,
        told=str,
        may_pass=may_pass,
        **{"first_pause": 0.01, **options},
    )


def test_one_push_at_a_time_and_the_newest_wins(taker: Taker) -> None:
    taker.open.clear()
    behind = pusher(taker)
    behind.submit(A, 1)
    assert taker.entered.wait(20)
    behind.submit(B, 2)
    behind.submit(C, 3)
    assert taker.dropped == [B]
    taker.open.set()
    assert behind.close(20)
    assert taker.pushed == [(A, 1), (C, 3)]
    assert taker.dropped == [B, A, C]
    assert taker.lines == ["pushed 1", "pushed 3"]


def test_a_push_that_fails_is_told_and_tried_again(taker: Taker) -> None:
    taker.errors = [ConnectionError("reset"), TimeoutError("slow")]
    behind = pusher(taker)
    behind.submit(A, 1)
    assert behind.close(20)
    assert taker.pushed == [(A, 1)]
    assert [line.split(":")[0] for line in taker.lines[:2]] == ["step 1 is not on the Hub yet"] * 2


def test_the_pause_is_as_long_as_the_hub_asks_for(taker: Taker) -> None:
    taker.errors = [ConnectionError("limited")]
    behind = pusher(taker, asked_to_wait=lambda error: 7200.0)
    behind.submit(A, 1)
    while not taker.lines:
        time.sleep(0.01)
    assert taker.lines == ["step 1 is not on the Hub yet: limited, next try in 1 h 00 min"]  # an hour at most
    assert behind.close(20)
    assert taker.pushed == [(A, 1)]


def test_a_push_that_takes_long_is_told_when_the_next_one_comes(taker: Taker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.hub.pusher._SECONDS_BEFORE_IT_IS_SLOW", 0.0)
    taker.open.clear()
    behind = pusher(taker)
    behind.submit(A, 1)
    assert taker.entered.wait(20)
    assert taker.lines == []
    behind.submit(B, 2)
    assert taker.lines == ["step 1 is still on its way to the Hub since 0 s; 2 waits"]
    taker.open.set()
    assert behind.close(20)


def test_a_newer_folder_takes_the_place_of_one_that_failed(taker: Taker) -> None:
    taker.errors = [ConnectionError("reset")]
    behind = pusher(taker, first_pause=30.0)
    behind.submit(A, 1)
    while not taker.lines:
        time.sleep(0.01)
    behind.submit(B, 2)
    assert behind.close(20)  # the end of the run cuts the pause short
    assert taker.pushed == [(B, 2)]
    assert taker.dropped == [A, B]


def test_the_end_waits_for_no_hub_that_refuses_for_good(taker: Taker) -> None:
    taker.errors = [PermissionError("forbidden") for _ in range(3)]
    behind = pusher(taker, may_pass=lambda error: False, first_pause=30.0)
    behind.submit(A, 1)
    while not taker.lines:
        time.sleep(0.01)
    started = time.monotonic()
    assert not behind.close(25)
    assert time.monotonic() - started < 20
    assert len(taker.errors) == 1  # once when it was told, once more at the end


def test_the_end_does_not_wait_for_a_hub_that_asks_for_longer_than_is_left(taker: Taker) -> None:
    taker.errors = [ConnectionError("limited") for _ in range(3)]
    behind = pusher(taker, asked_to_wait=lambda error: 3600.0)
    behind.submit(A, 1)
    while not taker.lines:
        time.sleep(0.01)
    started = time.monotonic()
    assert not behind.close(25)
    assert time.monotonic() - started < 20
    assert len(taker.errors) == 1  # once when it was told, once more at the end


def test_the_end_does_not_wait_for_a_push_that_hangs_and_nothing_is_said_afterwards(taker: Taker) -> None:
    taker.open.clear()
    behind = pusher(taker)
    behind.submit(A, 1)
    assert taker.entered.wait(20)
    assert not behind.close(0.05)
    taker.open.set()
    while not taker.dropped:
        time.sleep(0.01)
    assert taker.lines == []


def test_a_stage_shares_the_bytes_of_its_checkpoint_and_not_its_paths(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-000004"
    (checkpoint / "training_state").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    (checkpoint / "config.json").write_text(
        '{"_name_or_path": "/home/me/base", "up": "../../home/me", "n": 1, "dtype": "float32"}'
    )
    (checkpoint / "training_state" / "optimizer.safetensors").write_bytes(b"moments")
    words = '{"added_tokens": [{"content": "/home"}]}'
    (checkpoint / "tokenizer.json").write_text(words)
    (checkpoint / ".hidden").write_text("secret")
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "adapter_model.safetensors"):
        (checkpoint / name).write_bytes(b"of another program")
    (checkpoint / "runs" / "my-laptop").mkdir(parents=True)
    (checkpoint / "runs" / "my-laptop" / "README.md").write_text("logs")
    staged = stage(tmp_path / "staged", checkpoint)
    assert sorted(path.name for path in staged.rglob("*")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (staged / "tokenizer.json").read_text() == words
    assert (staged / "model.safetensors").samefile(checkpoint / "model.safetensors")
    assert "/home" not in (staged / "config.json").read_text()
    assert '"n": 1' in (staged / "config.json").read_text()
    assert "/home/me/base" in (checkpoint / "config.json").read_text()


def test_a_file_system_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    staged = stage(tmp_path / "staged", tmp_path / "model")
    assert (staged / "model.safetensors").read_bytes() == b"weights"
