"""A run's weights on the Hub: which of its folders are pushed, when, and what is said of it.

Training never waits for a push but at its end, and then not for long: what is left to do is one command.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from common.atomic_files import write_atomically
from training.checkpoints.resume_command import program
from training.hub.pusher import FIRST_PAUSE_SECONDS, Pusher
from training.hub.repository import (
    NATIVE,
    HubOutOfReachError,
    asked_to_wait,
    claim,
    has_branch,
    may_pass,
    push_folder,
    told,
)
from training.hub.staging import stage
from training.recipe import Recipe

LAST_PUSH_SECONDS = 900.0  # 2 GB at 20 Mbit/s

_STAGES = ".pushing"
_PUSHED = ".pushed.json"  # what is on the Hub of a run
_WAY_OUT = "or train with push_to_hub: false and push the run later with python -m training.hub push"


def claim_repository(recipe: Recipe, *, goes_on: bool) -> str | None:
    """The id of the repository that the run may push to, which exists from now on.

    A run that goes on is not kept from that by a Hub that does not answer: an earlier start has found that it may push.
    None where that start did not get so far that the repository's id is known.

    Raises:
        InputError: there is none that it may write to.
    """
    try:
        return claim(
            recipe.hub_model_id,
            default_name=Path(recipe.output_dir).name,
            private=recipe.hub_private_repo,
            way_out=_WAY_OUT,
        )
    except HubOutOfReachError as error:
        if not goes_on:
            raise
        named = recipe.hub_model_id if "/" in (recipe.hub_model_id or "") else None
        repo_id = named or pushed_until_now(Path(recipe.output_dir))[0]
        print(f"training goes on without the Hub{'' if repo_id else ', and pushes nothing'}: {error}", flush=True)
        return repo_id


def pushed_until_now(output_dir: Path) -> tuple[str | None, int]:
    """The repository that a run was pushed to, None where nobody knows, and the step of the newest push, -1 before."""
    try:
        found = json.loads((output_dir / _PUSHED).read_text(encoding="utf-8"))
        return str(found["repo_id"]), int(found["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, -1


def remember_push(output_dir: Path, repo_id: str, step: int) -> None:
    """Note in a run's folder what of it is on the Hub."""
    text = json.dumps({"repo_id": repo_id, "step": step}) + "\n"
    with contextlib.suppress(OSError):  # a full disk: the worst that comes of it is a push too many
        write_atomically(output_dir / _PUSHED, text)


def still_to_push(recipe: Recipe, step: int) -> str | None:
    """What to say of a finished run whose last push did not come about; None where it did, or where none was asked for.

    What that push left in the run's folder is removed.
    """
    output_dir = Path(recipe.output_dir)
    shutil.rmtree(output_dir / _STAGES, ignore_errors=True)
    repo_id, pushed = pushed_until_now(output_dir)
    if not recipe.push_to_hub or pushed == step:
        return None
    return finishing_words(recipe, repo_id or recipe.hub_model_id or output_dir.name)


def finishing_words(recipe: Recipe, repo_id: str) -> str:
    """The one command that is left to do after a last push that failed."""
    state = " --checkpoint" if recipe.hub_strategy == "checkpoint" else ""
    return (
        "the last push is not on the Hub; the model is whole here, and this finishes it:\n"
        f"  {program('python')} -m training.hub push {quote(recipe.output_dir)} --repo_id {repo_id}{state}"
    )


class Publishing:
    """Pushes checkpoints as they are saved, and the model folder at the end.

    Args:
        recipe: of the run.
        repo_id: from `claim_repository`.
        say: is given the lines; also from another thread.
        write_card: writes README.md into a folder, for so many steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        repo_id: str,
        *,
        say: Callable[[str], None],
        write_card: Callable[[Path, int], None],
    ) -> None:
        self._recipe, self._repo_id, self._say, self._write_card = recipe, repo_id, say, write_card
        self._output_dir = Path(recipe.output_dir)
        shutil.rmtree(self._output_dir / _STAGES, ignore_errors=True)  # of a run that was killed
        self._pusher = Pusher(
            self._push,
            drop=_drop,
            say=say,
            told=told,
            may_pass=may_pass,
            asked_to_wait=asked_to_wait,
            first_pause=FIRST_PAUSE_SECONDS,
        )
        self._finished = False
        self._numbers = 0

    def on_saved(self, checkpoint: Path, step: int) -> None:
        """Push a checkpoint that is whole, if the strategy says so; its folder may be removed any time afterwards."""
        if self._recipe.hub_strategy == "end":
            return
        state = checkpoint if self._recipe.hub_strategy == "checkpoint" else None
        try:
            folder = stage(self._new_place(step), checkpoint, curves=self._output_dir / "curves.png", state=state)
            self._write_card(folder, step)
        except Exception as error:  # a full disk, or whatever it is: the checkpoint was worth it, this is not
            self._say(f"step {step:,} is not pushed: {told(error)}")
            return
        self._pusher.submit(folder, step)

    def finish(self, model: Path, step: int, checkpoint: Path | None) -> None:
        """Push the model folder of the finished run, and wait for that for `LAST_PUSH_SECONDS` at most."""
        self._finished = True
        state = checkpoint if self._recipe.hub_strategy == "checkpoint" else None
        done = False
        try:
            folder = stage(self._new_place(step), model, state=state)
            self._pusher.submit(folder, step)
            self._say(f"pushing the model to {self._repo_id}")
            done = self._pusher.close(LAST_PUSH_SECONDS)
        except OSError as error:
            self._say(f"step {step:,} is not pushed: {told(error)}")
        finally:  # also of Ctrl-C
            shutil.rmtree(self._output_dir / _STAGES, ignore_errors=True)
            if not done:
                self._say(finishing_words(self._recipe, self._repo_id))

    def close(self) -> None:
        """Wait for nothing: a run that was asked to leave, or failed, pushes with its next checkpoint."""
        if not self._pusher.close(0.0) and not self._finished:
            self._say("the newest checkpoint is not on the Hub yet; it goes there when the run goes on")
        shutil.rmtree(self._output_dir / _STAGES, ignore_errors=True)

    def _new_place(self, step: int) -> Path:
        # A step may be pushed twice, as its checkpoint and as the model folder.
        self._numbers += 1
        place = self._output_dir / _STAGES / f"{self._numbers}-step-{step:06d}"
        place.parent.mkdir(exist_ok=True)
        return place

    def _push(self, folder: Path, step: int) -> str:
        tag = f"step-{step:06d}"
        pushed = push_folder(folder, self._repo_id, message=f"Step {step:,}", tag=tag)
        remember_push(self._output_dir, self._repo_id, step)
        kept = "; the card was edited there, and its text is kept" if pushed.card_kept else ""
        older = f"; its branch {NATIVE} holds older weights" if has_branch(self._repo_id, NATIVE) else ""
        return f"step {step:,} is on the Hub: {self._repo_id}, tag {tag}{kept}{older}"


def _drop(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
