"""A run's weights on the Hub: which of its folders are pushed, when, and what is said of it.

Training never waits for a push but at its end, and then not for long: what is left to do is one command.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from training.hub_repository import asked_to_wait, claim, may_pass, push_folder, told
from training.launching import program
from training.pusher import FIRST_PAUSE_SECONDS, Pusher
from training.recipe import Recipe
from training.staging import stage

LAST_PUSH_SECONDS = 900.0  # 2 GB at 20 Mbit/s

_STAGES = ".pushing"
_WAY_OUT = "or train with push_to_hub: false and push the run later with python -m training.hub push"


def claim_repository(recipe: Recipe) -> str:
    """The id of the repository that the run may push to, which exists from now on.

    Raises:
        InputError: there is none that it may write to.
    """
    return claim(
        recipe.hub_model_id,
        default_name=Path(recipe.output_dir).name,
        private=recipe.hub_private_repo,
        way_out=_WAY_OUT,
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
        except OSError as error:
            self._say(f"step {step:,} is not pushed: {told(error)}")
        else:
            self._pusher.submit(folder, step)
            self._say(f"pushing the model to {self._repo_id}")
            done = self._pusher.close(LAST_PUSH_SECONDS)
        shutil.rmtree(self._output_dir / _STAGES, ignore_errors=True)
        if not done:
            self._say(
                "the last push is not on the Hub; the model is whole here, and this finishes it:\n"
                f"  {program('python')} -m training.hub push {quote(str(self._output_dir))} --repo_id {self._repo_id}"
            )

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
        kept = "; the card was edited there, and its text is kept" if pushed.card_kept else ""
        return f"step {step:,} is on the Hub: {self._repo_id}, tag {tag}{kept}"


def _drop(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
