"""Pushes a run to the Hub while it trains: checkpoints in the background, and the model at the end."""

import contextlib
import json
import math
import shutil
import threading
import time
from pathlib import Path
from shlex import quote

from common.atomic_files import write_atomically
from common.durations import format_duration
from training.checkpoints.resume_command import program
from training.hub.card import write_model_card
from training.hub.hub_errors import HubOutOfReachError, can_retry, one_line, retry_after
from training.hub.repository import NATIVE, ensure_repository, push_folder
from training.hub.staging import stage
from training.monitoring.run_history import RunHistory
from training.recipe import Recipe
from training.step.hooks import Hook, Run

LAST_PUSH_SECONDS = 900.0  # 2 GB at 20 Mbit/s
FIRST_PAUSE_SECONDS = 5.0

_DOUBLINGS = 6  # of the pause between retries, which is at most 320 seconds
_LONGEST_RATE_LIMIT_SECONDS = 3600.0
_SLOW_PUSH_SECONDS = 60.0
_STAGING = ".pushing"
_PUSHED = ".pushed.json"  # what of a run is on the Hub
_ADVICE = "or train with push_to_hub: false and push the run later with python -m training.hub push"


def claim_repository(recipe: Recipe, *, resumes: bool) -> str | None:
    """Return the id of the repository that the run pushes to, which exists and accepts our writes.

    An unreachable Hub does not stop a run that resumes: an earlier start has checked the repository. The result
    is None if that start did not get far enough to know its id.

    Raises:
        InputError: we cannot write to it.
    """
    name = Path(recipe.output_dir).name
    try:
        return ensure_repository(
            recipe.hub_model_id, default_name=name, private=recipe.hub_private_repo, advice=_ADVICE
        )
    except HubOutOfReachError as error:
        if not resumes:
            raise
        is_full_id = "/" in (recipe.hub_model_id or "")
        repo_id = recipe.hub_model_id if is_full_id else last_push(Path(recipe.output_dir))[0]
        print(f"resuming without the Hub{'' if repo_id else ', and nothing will be pushed'}: {error}", flush=True)
        return repo_id


def last_push(output_dir: Path) -> tuple[str | None, int]:
    """Return the repository and the step of a run's newest push; None and -1 before the first."""
    try:
        pushed = json.loads((output_dir / _PUSHED).read_text(encoding="utf-8"))
        return str(pushed["repo_id"]), int(pushed["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None, -1


def record_push(output_dir: Path, repo_id: str, step: int) -> None:
    """Record a push in the run folder."""
    text = json.dumps({"repo_id": repo_id, "step": step}) + "\n"
    with contextlib.suppress(OSError):  # on a full disk, the worst case is one push too many
        write_atomically(output_dir / _PUSHED, text)


def pending_push(recipe: Recipe, step: int) -> str | None:
    """Return what to print about a complete run whose last push failed; None if nothing is left to push."""
    output_dir = Path(recipe.output_dir)
    shutil.rmtree(output_dir / _STAGING, ignore_errors=True)
    repo_id, pushed = last_push(output_dir)
    if not recipe.push_to_hub or pushed == step:
        return None
    return _push_command(recipe, repo_id or recipe.hub_model_id or output_dir.name)


def _push_command(recipe: Recipe, repo_id: str) -> str:
    checkpoint = " --checkpoint" if recipe.hub_strategy == "checkpoint" else ""
    return (
        "the final model is not on the Hub yet; push it with\n"
        f"  {program('python')} -m training.hub push {quote(recipe.output_dir)} --repo_id {repo_id}{checkpoint}"
    )


class Publisher(Hook):
    """Pushes checkpoints and the final model on rank 0, one at a time, and retries what fails.

    A newer checkpoint replaces one that waits. Training waits only for the last push, and for `LAST_PUSH_SECONDS` at
    most; the command that finishes it is printed.
    """

    def __init__(self, run: Run, repo_id: str, history: RunHistory) -> None:
        self._run, self._repo_id, self._history = run, repo_id, history
        self._staging = run.output_dir / _STAGING
        shutil.rmtree(self._staging, ignore_errors=True)  # of a run that was killed
        self._newest = run.resume_from
        self._changed = threading.Condition()
        self._waiting: tuple[Path, int] | None = None
        self._in_progress: tuple[int, float] | None = None  # step, start time
        self._deadline = math.inf  # set when the run ends
        self._stopped = self._gave_up = self._finished = False
        # A daemon, unlike the threads of `HfApi.run_as_future`: the interpreter waits for an executor's threads, so an
        # upload that hangs would keep a finished run alive.
        threading.Thread(target=self._work, name="publisher", daemon=True).start()

    def after_save(self, run: Run, checkpoint: Path, step: int) -> None:
        """Push a checkpoint if the strategy asks for it; the last one is pushed as the model folder."""
        self._newest = checkpoint
        if run.recipe.hub_strategy == "end" or step == run.total_steps:
            return
        try:
            folder = self._stage(checkpoint, step)
            facts = self._history.facts(run.recipe, steps=step, parameters=run.parameters)
            write_model_card(folder, run.recipe, facts, run.config, earlier=run.output_dir / "model")
        except Exception as error:  # such as a full disk: training continues
            run.report(f"step {step:,} is not pushed: {one_line(error)}")
        else:
            self.submit(folder, step)

    def after_training(self, run: Run) -> None:
        """Push the model folder, and wait for that."""
        self._finished = True
        done = False
        try:
            self.submit(self._stage(run.output_dir / "model", run.step), run.step)
            run.report(f"pushing the model to {self._repo_id}")
            done = self.stop(LAST_PUSH_SECONDS)
        except OSError as error:
            run.report(f"step {run.step:,} is not pushed: {one_line(error)}")
        finally:  # also on Ctrl-C
            if not done:
                run.report(_push_command(run.recipe, self._repo_id))

    def close(self) -> None:
        """Stop without waiting: a run that was interrupted pushes its next checkpoint when it resumes."""
        if not self.stop(0.0) and not self._finished:
            self._run.report("the newest checkpoint is not on the Hub yet; it is pushed when the run resumes")
        shutil.rmtree(self._staging, ignore_errors=True)

    def _stage(self, model: Path, step: int) -> Path:
        self._staging.mkdir(exist_ok=True)
        state = self._newest if self._run.recipe.hub_strategy == "checkpoint" else None
        curves = self._run.output_dir / "curves.png"
        return stage(self._staging / f"step-{step:06d}", model, curves=curves, state=state)

    def submit(self, folder: Path, step: int) -> None:
        """Push a folder as soon as the push in progress is over; returns immediately."""
        with self._changed:
            replaced, self._waiting = self._waiting, (folder, step)
            if self._in_progress is not None:
                pushing, started = self._in_progress
                if (seconds := time.monotonic() - started) > _SLOW_PUSH_SECONDS:
                    self._report(
                        f"the push of step {pushing:,} has taken {format_duration(seconds)}; step {step:,} waits"
                    )
            self._changed.notify_all()
        if replaced is not None:
            shutil.rmtree(replaced[0], ignore_errors=True)

    def stop(self, seconds: float) -> bool:
        """Wait until everything is pushed, and return whether it is; reports nothing afterwards.

        It does not wait for an error that a retry cannot fix, or for a rate limit that ends after `seconds`.
        """

        def is_idle() -> bool:
            return self._in_progress is None and self._waiting is None

        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
            self._changed.wait_for(lambda: is_idle() or self._gave_up, seconds)
            done = is_idle() and not self._gave_up
            self._waiting, self._stopped = None, True
            self._changed.notify_all()
        return done

    def _work(self) -> None:
        failures = 0  # in a row
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._stopped)
                if self._waiting is None:
                    return
                (folder, step), self._waiting = self._waiting, None
                self._in_progress = step, time.monotonic()
            try:
                line, failure = self._push(folder, step), None
            except Exception as error:  # training continues
                line, failure = "", error
            with self._changed:
                self._in_progress = None
                if failure is None:
                    self._report(line)
                    failures = 0
                else:
                    self._waiting = self._waiting or (None if self._stopped else (folder, step))
                    self._wait_to_retry(step, failure, FIRST_PAUSE_SECONDS * 2 ** min(failures, _DOUBLINGS))
                    failures += 1
                if self._waiting is None or self._waiting[0] != folder:
                    shutil.rmtree(folder, ignore_errors=True)
                self._changed.notify_all()

    def _wait_to_retry(self, step: int, error: Exception, pause: float) -> None:
        """Report a failed push and wait for the retry, or until the run ends; at its end, some errors are final."""
        rate_limit, deadline = retry_after(error), self._deadline
        pause = max(pause, min(rate_limit, _LONGEST_RATE_LIMIT_SECONDS))
        if deadline < math.inf and (not can_retry(error) or time.monotonic() + rate_limit > deadline):
            self._gave_up = True
        retry = "" if self._gave_up else f", retry in {format_duration(pause)}"
        self._report(f"the push of step {step:,} failed: {one_line(error)}{retry}")
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._stopped or self._deadline != deadline, pause)

    def _push(self, folder: Path, step: int) -> str:
        tag = f"step-{step:06d}"
        pushed = push_folder(folder, self._repo_id, message=f"Step {step:,}", tag=tag)
        record_push(self._run.output_dir, self._repo_id, step)
        card = "; the card was edited there, so only its metadata and results are updated" if pushed.card_kept else ""
        older = f"; its branch {NATIVE} has older weights" if pushed.has_native else ""
        return f"step {step:,} is on the Hub: {self._repo_id}, tag {tag}{card}{older}"

    def _report(self, line: str) -> None:
        if not self._stopped:  # the log may be closed
            self._run.report(line)
