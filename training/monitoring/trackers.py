"""Trackers: TensorBoard, Weights & Biases and Trackio, through accelerate.

A resumed run continues the same run of its tracker. TensorBoard drops values after the checkpoint; Weights & Biases
keeps the first values of a step, which are the same; Trackio shows such steps twice.
"""

import secrets
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

from common.cli_errors import InputError
from training.recipe import Recipe

PROJECT = "gpt2-scratch"
_AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}


def chosen_trackers(recipe: Recipe) -> list[str]:
    """The trackers that `report_to` names ("all": all that are installed); a missing one is an `InputError`."""
    if "all" in recipe.report_to:
        return [name for name in _AVAILABLE if _AVAILABLE[name]()]
    chosen: list[str] = [name for name in _AVAILABLE if name in recipe.report_to]
    missing = [name for name in chosen if not _AVAILABLE[name]()]
    if missing:
        raise InputError(
            f"report_to names {' and '.join(missing)}, which cannot be imported; run "
            f"pip install -c constraints.txt -e '.[{','.join(missing)}]'"
        )
    return chosen


def start_trackers(accelerator: Accelerator, recipe: Recipe, first_step: int) -> None:
    """Start a run in each tracker that the recipe names, or continue the run of an earlier start.

    Weights & Biases without a login is an `InputError`.
    """
    names = chosen_trackers(recipe)
    if not names:
        return
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": first_step + 1} if first_step else {}}
    wandb_errors: tuple[type[Exception], ...] = ()
    if accelerator.is_main_process and {"wandb", "trackio"} & set(names):
        name = _tracker_run_name(Path(recipe.output_dir))
        # "allow": continue the run of this name, or create it.
        options["wandb"] = {"id": name, "name": name, "dir": recipe.output_dir, "resume": "allow"}
        options["trackio"] = {"name": name, "resume": "allow"}
    if "wandb" in names:
        import wandb

        wandb_errors = (wandb.errors.Error,)
    known = (bool, int, float, str)  # to all trackers
    settings = {key: value if isinstance(value, known) else str(value) for key, value in recipe.to_dict().items()}
    try:
        # Settings only at the first start: TensorBoard makes a separate run of them each time.
        accelerator.init_trackers(PROJECT, config=None if first_step else settings, init_kwargs=options)
    except wandb_errors as error:
        raise InputError(
            f"Weights & Biases cannot be started: {str(error).strip().splitlines()[0]}; "
            "run `wandb login`, or set WANDB_MODE=offline"
        ) from None


def _tracker_run_name(output_dir: Path) -> str:
    """The run's name in its trackers: the name of its folder, and a random suffix that makes it unique."""
    path = output_dir / "tracker_run.txt"
    if not path.exists():
        path.write_text(f"{output_dir.name}-{secrets.token_hex(4)}\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
