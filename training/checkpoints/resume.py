"""Where a run goes on, and whether the output folder is the recipe's to write to."""

import os
import tempfile
from collections.abc import Collection
from itertools import chain, count
from pathlib import Path

import yaml

from common.cli_errors import InputError
from common.folder_lock import LOCK_NAME
from training.checkpoints.checkpoint_folder import TrainerState, checkpoints, refuse_damaged, step_of
from training.recipe import Recipe

_TRIAL = ".can-be-written-"


def find_resume_point(recipe: Recipe) -> Path | None:
    """The checkpoint that the recipe goes on from, or None for a run that begins at its beginning.

    One of another folder is where a branch begins: the branch's own checkpoints go before it once there are any.

    Raises:
        InputError: the output folder cannot be written or holds another run or other files, the run must not be
            started over, or the checkpoint's data or model are not the recipe's.
    """
    output_dir, wish = Path(recipe.output_dir), recipe.resume_from_checkpoint
    _refuse_unusable(output_dir)
    if Path(recipe.data_dir).resolve().is_relative_to(output_dir.resolve()):
        raise InputError(f"data_dir {recipe.data_dir} lies in output_dir {output_dir}; choose folders side by side")
    is_run = (output_dir / "recipe.yaml").is_file()
    if not is_run and output_dir.is_dir() and any(_is_foreign(path) for path in output_dir.iterdir()):
        raise InputError(f"output_dir {output_dir} holds files but no run of ours; choose another output_dir")
    if is_run:
        _refuse_another_run(recipe, _keys_of(output_dir / "recipe.yaml"), f"output_dir {output_dir}")
    if wish == "none" and is_run:
        raise InputError(
            f"output_dir {output_dir} holds a run, and resume_from_checkpoint is none; "
            "leave that out to continue, or choose another output_dir"
        )
    if wish not in ("auto", "none"):
        state = TrainerState.read(Path(wish))
        _refuse_another_run(recipe, state.recipe, f"checkpoint {wish}")
        is_branch = Path(wish).resolve().parent != (output_dir / "checkpoints").resolve()
        ahead = [path for path in checkpoints(output_dir) if step_of(path) > state.step]
        # The command that began a branch in this folder goes on with it when it is given again.
        chosen = ahead[-1] if is_branch and ahead else Path(wish)
        return _checked(recipe, chosen, f"checkpoint {chosen}")
    found = checkpoints(output_dir)
    if found:
        return _checked(recipe, found[-1], f"output_dir {output_dir}")
    if (output_dir / "model").exists():
        raise InputError(
            f"output_dir {output_dir} holds a finished model but no checkpoint to go on from; "
            f"choose another output_dir, and start from it with init_from: {output_dir / 'model'}"
        )
    return None


def good_checkpoint(output_dir: Path, before: int, validated: Collection[int]) -> str:
    """What a run that is stopped says of the checkpoint to go on from.

    Arguments:
        output_dir: the run's folder.
        before: the first step whose update was skipped. The update just before it may have broken the weights.
        validated: steps with a finite validation loss: their weights are good.
    """
    found = checkpoints(output_dir)
    if not found:
        return "there is no checkpoint yet, and it will begin again"
    good = [path for path in found if (step := step_of(path)) != before - 1 or step in validated]
    if good and good[-1] == found[-1]:
        return f"the newest good checkpoint is {good[-1]}, and it will go on from there"
    if good:
        return f"the newest good checkpoint is {good[-1]}; go on from it with --resume_from_checkpoint {good[-1]}"
    return f"no checkpoint is known to be good ({found[-1]} may hold spoilt weights); choose another output_dir"


def _is_foreign(path: Path) -> bool:
    """Whether a file in a folder without a recipe is somebody's, and not of a start that was killed or is beside us."""
    return path.name != LOCK_NAME and not path.name.startswith((_TRIAL, "recipe.yaml."))


def _checked(recipe: Recipe, checkpoint: Path, where: str) -> Path:
    _refuse_another_run(recipe, TrainerState.read(checkpoint).recipe, where)
    # Hashing a large checkpoint takes seconds: once on each machine is enough.
    refuse_damaged(checkpoint, read_files=os.environ.get("LOCAL_RANK", "0") == "0")
    return checkpoint


def _refuse_unusable(output_dir: Path) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file, expected a folder; choose another output_dir")
    parent = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    try:
        # Only writing tells: permissions say nothing of file systems that take no folders.
        with tempfile.TemporaryDirectory(dir=parent, prefix=_TRIAL) as trial:
            (Path(trial) / "file").write_bytes(b"x" * 4096)
    except OSError as error:
        raise InputError(
            f"output_dir {output_dir} cannot be written ({error.strerror}); choose another output_dir"
        ) from None


def _keys_of(path: Path) -> dict[str, object]:
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        keys = None
    if not isinstance(keys, dict):
        raise InputError(f"{path} of an earlier run cannot be read; mend it, or choose another output_dir")
    return keys


def _refuse_another_run(recipe: Recipe, earlier: dict[str, object], where: str) -> None:
    differences = recipe.differences_from(earlier)
    if differences:
        raise InputError(
            f"{where} holds another run ({'; '.join(differences)}); undo the difference, or choose another output_dir"
        )


def refuse_earlier_end(checkpoint: Path, done: int, end: int) -> None:
    """Refuse to go on to an end that lies before the checkpoint.

    Raises:
        InputError: it does.
    """
    if done > end:
        raise InputError(
            f"{checkpoint} is {done:,} steps long, and the run was asked to end after {end:,}; "
            "give it a later end, or choose another output_dir"
        )


def set_aside_later_checkpoints(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints that lie behind `step`, where a run is about to go on from an older one.

    Otherwise the branch that was left would be continued, or make the new one's checkpoints look old.

    Returns:
        Their new places, `checkpoints/abandoned-step-000060`; `abandoned-2-step-000060` where that is taken.
    """
    places = []
    for path in checkpoints(output_dir):
        if step_of(path) > step:
            names = chain([f"abandoned-{path.name}"], (f"abandoned-{number}-{path.name}" for number in count(2)))
            place = next(place for name in names if not (place := path.with_name(name)).exists())
            places.append(path.rename(place))
    return places
