"""Pushing behind training: one push at a time in a thread, the newest wins, and what goes wrong is tried again.

The thread is a daemon, not `HfApi.run_as_future`: the interpreter waits for an executor's threads at its end, and an
upload that hangs would keep a finished run alive.
"""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common.durations import format_duration

FIRST_PAUSE_SECONDS = 5.0

_LONGEST_PAUSE_SECONDS = 300.0
_LONGEST_WAIT_ASKED_FOR = 3600.0
_SECONDS_BEFORE_IT_IS_SLOW = 60.0

Push = Callable[[Path, int], str]


class Pusher:
    """Pushes folders one after the other; a newer one takes the place of one that waits.

    Args:
        push: pushes a folder of a step and returns a line on it, or raises.
        drop: is given folders that are done with.
        say: is given the lines on what happened.
        told: says an error in one line.
        may_pass: whether an error may go away by itself.
        asked_to_wait: the seconds that an error asks us to wait for; the pause before the next try is no shorter.
        first_pause: seconds before the second try, doubled each time.
    """

    def __init__(
        self,
        push: Push,
        *,
        drop: Callable[[Path], None],
        say: Callable[[str], None],
        told: Callable[[BaseException], str],
        may_pass: Callable[[BaseException], bool],
        asked_to_wait: Callable[[BaseException], float] = lambda error: 0.0,
        first_pause: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._push, self._drop, self._say, self._told, self._may_pass = push, drop, say, told, may_pass
        self._asked_to_wait = asked_to_wait
        self._first_pause = first_pause
        self._changed = threading.Condition()
        self._waiting: tuple[Path, int] | None = None
        self._busy: tuple[int, float] | None = None  # the step that goes up, and since when
        self._closing = False  # the run is at its end: no pause is long any more
        self._deadline = math.inf  # of those who wait for the end
        self._over = False  # nobody waits any more
        self._given_up: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, folder: Path, step: int) -> None:
        """Push `folder` as soon as the push in progress is over; returns at once."""
        with self._changed:
            replaced, self._waiting = self._waiting, (folder, step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pusher", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            if self._busy is not None and (since := time.monotonic() - self._busy[1]) > _SECONDS_BEFORE_IT_IS_SLOW:
                self._say(
                    f"step {self._busy[0]:,} is still on its way to the Hub since "
                    f"{format_duration(since)}; {step:,} waits"
                )
        if replaced is not None:
            self._drop(replaced[0])

    def close(self, seconds: float) -> bool:
        """Wait until nothing is left to push, at most for so long; return whether that came about.

        What the Hub refuses for good is not waited for, nor a next try that it allows only later than that. Nothing is
        said any more afterwards.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closing, self._deadline = True, deadline
            self._changed.notify_all()
            while self._busy is not None or self._waiting is not None:
                left = deadline - time.monotonic()
                if left <= 0 or self._given_up is not None:
                    break
                self._changed.wait(left)
            done = self._busy is None and self._waiting is None and self._given_up is None
            self._say = lambda line: None
            self._waiting, self._over = None, True
            self._changed.notify_all()
        return done

    def _work(self) -> None:
        pause = self._first_pause
        while True:
            with self._changed:
                while self._waiting is None:
                    if self._over:
                        return
                    self._changed.wait()
                (folder, step), self._waiting = self._waiting, None
                self._busy = step, time.monotonic()
            try:
                line = self._push(folder, step)
            except Exception as error:  # whatever it is, training goes on
                self._put_back(folder, step, error, pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            pause = self._first_pause
            self._drop(folder)
            with self._changed:
                self._say(line)
                self._busy = None
                self._changed.notify_all()

    def _put_back(self, folder: Path, step: int, error: Exception, pause: float) -> None:
        """Let the folder wait for its next try, unless a newer one does, and pause until then or the end of the run."""
        with self._changed:
            self._busy = None
            asked = self._asked_to_wait(error)
            pause = max(pause, min(asked, _LONGEST_WAIT_ASKED_FOR))
            if self._waiting is None and not self._over:
                self._waiting = (folder, step)
            else:
                self._drop(folder)
            closing = self._closing
            if closing and (not self._may_pass(error) or time.monotonic() + asked > self._deadline):
                self._given_up = error
            later = "" if self._given_up else f", next try in {format_duration(pause)}"
            self._say(f"step {step:,} is not on the Hub yet: {self._told(error)}{later}")
            self._changed.notify_all()
            until = time.monotonic() + pause
            while (left := until - time.monotonic()) > 0 and self._closing == closing and not self._over:
                self._changed.wait(left)
