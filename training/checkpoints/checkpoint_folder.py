"""Checkpoints: model folders that load with `from_pretrained`, each with the training state to go on from.

    checkpoints/step-000500/                    config.json, model.safetensors, tokenizer.json, …
    checkpoints/step-000500/training_state/     trainer_state.json, optimizer.safetensors, rng_state_0.safetensors, …

A checkpoint is written under another name and renamed when whole, so the newest `step-*` folder is always good, and
older ones are removed only after that. Nothing is pickled. `training_state/SHA256SUMS` tells whether the disk still has
what was written; `sha256sum --check training_state/SHA256SUMS` looks by hand.
"""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from common.atomic_files import fsync
from common.cli_errors import InputError
from training.checkpoints.checksums import damage_in, write_checksums
from training.checkpoints.state_snapshot import Snapshot, bare_model, restore_rng_state
from training.data.tokenization.tokenizer import Tokenizer

_NAME = re.compile(r"step-(\d{6,})")
_Moments = dict[str, dict[str, torch.Tensor]]  # by parameter and moment
_FORMAT_VERSION = 1
_NOT_WHOLE = (".unfinished-", ".removed-", ".replaced-")  # what a folder is called while it is written or removed
_WHOLE = StateDictOptions(full_state_dict=True)


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: steps done, tokens seen, and what the rest must agree with."""

    step: int
    tokens: int
    tokenizer_fingerprint: str
    shards: list[str]
    recipe: dict[str, Any]
    num_processes: int

    def write(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint folder, after the version of the folder's format."""
        values = {"format_version": _FORMAT_VERSION, **asdict(self)}
        path = checkpoint / "training_state" / "trainer_state.json"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainerState":
        """The state in a checkpoint folder.

        Raises:
            InputError: the folder is not a checkpoint of ours, or one of another format.
        """
        path = checkpoint / "training_state" / "trainer_state.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version", None)
            if version != _FORMAT_VERSION:
                which = "a newer" if isinstance(version, int) and version > _FORMAT_VERSION else "another"
                raise InputError(
                    f"checkpoint {checkpoint} is of {which} format: expected format_version {_FORMAT_VERSION}, "
                    f"found {version}; go on with the version of this project that wrote it"
                )
            state = cls(**values)
            if not (isinstance(state.step, int) and isinstance(state.tokens, int) and isinstance(state.recipe, dict)):
                raise TypeError("step, tokens or recipe of another type")
            return state
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{checkpoint} is not a checkpoint: expected {path.relative_to(checkpoint)} in it; "
                "name a folder such as runs/quickstart/checkpoints/step-000500"
            ) from None
        except (json.JSONDecodeError, AttributeError, TypeError, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"checkpoint {checkpoint} is damaged: trainer_state.json is broken ({error}); {_older_one(checkpoint)}"
            ) from None


def refuse_damaged(checkpoint: Path, *, read_files: bool) -> None:
    """Refuse a checkpoint with a file that is missing or, with `read_files`, not what was written.

    Raises:
        InputError: the file is named, and the newest older checkpoint that is whole.
    """
    damage = damage_in(checkpoint, read_files=read_files)
    if damage is not None:
        raise InputError(f"checkpoint {checkpoint} is damaged: {damage}; {_older_one(checkpoint)}")


def _older_one(checkpoint: Path) -> str:
    """What to do instead of going on from a damaged checkpoint."""
    siblings = checkpoints(checkpoint.parent.parent)
    older = siblings[: siblings.index(checkpoint)] if checkpoint in siblings else []
    whole = next((path for path in reversed(older) if damage_in(path) is None), None)
    if whole is None:
        return "there is no older one that is whole: choose another output_dir, and start again"
    return f"go on from the one before: --resume_from_checkpoint {whole}"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps that a checkpoint of `checkpoints` has behind it, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration without weights, to write model folders with.

    Writing changes the configuration and asks the class for its source: neither is safe with the model in training.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton


def write_checkpoint(
    output_dir: Path,
    state: TrainerState,
    snapshot: Snapshot,
    *,
    skeleton: PreTrainedModel,
    tokenizer: Tokenizer,
    before_rename: Callable[[], None],
) -> Path:
    """Write the checkpoint of `state.step`; called by the main process alone.

    `before_rename` is called just before the checkpoint gets its final name.

    Returns:
        The checkpoint's folder, whole on disk.

    Raises:
        OSError, SafetensorError: the disk did not take it; nothing of it is left, older checkpoints are untouched.
    """
    target = checkpoint_folder(output_dir, state.step)
    unfinished = target.with_name(f".unfinished-{target.name}")
    remove_leftovers(output_dir)
    try:
        _write_files(unfinished, state, snapshot, skeleton, tokenizer)
        before_rename()
        publish(unfinished, target)
    except (OSError, SafetensorError):
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def _write_files(
    folder: Path, state: TrainerState, snapshot: Snapshot, skeleton: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    training_state = folder / "training_state"
    training_state.mkdir(parents=True)
    skeleton.save_pretrained(folder, state_dict=dict(snapshot.weights))
    tokenizer.save(folder, model_max_length=skeleton.config.n_positions)
    save_file(snapshot.optimizer, training_state / "optimizer.safetensors")
    save_file(snapshot.loop_state, training_state / "loop_state.safetensors")
    for rank, rng_state in enumerate(snapshot.rng_states):
        save_file(rng_state, training_state / f"rng_state_{rank}.safetensors")
    state.write(folder)
    write_checksums(folder)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a run that was killed while it saved left of folders under other names than their own."""
    for folder in (output_dir, output_dir / "checkpoints"):
        for kind in _NOT_WHOLE:
            for left in folder.glob(f"{kind}*"):
                shutil.rmtree(left, ignore_errors=True)


def remove_old_checkpoints(output_dir: Path, *, keep: int | None, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints (None keeps all) and those at multiples of `keep_every` steps."""
    for old in checkpoints(output_dir)[: -keep if keep else 0]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        # A half-removed folder must not look like a checkpoint.
        removed = old.with_name(f".removed-{old.name}")
        with contextlib.suppress(OSError):  # the next save tries again
            old.rename(removed)
            shutil.rmtree(removed)


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Make `folder` a copy of the checkpoint's model: all but what is only there to go on training."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("training_state"))


def load_checkpoint(
    checkpoint: Path,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loop_state: Mapping[str, torch.Tensor],
) -> None:
    """Put a checkpoint's optimizer state and random-number generators in place; its weights are loaded with the model.

    The tensors of `loop_state` are filled with what the checkpoint has under their names.

    On another number of processes than it was saved with, processes without a generator of their own keep a fresh one,
    so dropout differs there while the data stay the same.
    """
    folder = checkpoint / "training_state"
    bare = bare_model(accelerator, model)
    # `refuse_damaged` has looked at the files.
    flat = load_file(folder / "optimizer.safetensors")
    remembered = load_file(folder / "loop_state.safetensors")
    # The groups are the recipe's, as the optimizer was just built; only the moments come from the checkpoint.
    names = {parameter: name for name, parameter in bare.named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    state: dict[str, Any] = {"state": _nested(flat), "param_groups": groups}
    set_optimizer_state_dict(bare, optimizer, state, options=_WHOLE)
    for name in loop_state.keys() & remembered.keys():
        loop_state[name].copy_(remembered[name])
    generators = folder / f"rng_state_{accelerator.process_index}.safetensors"
    if generators.exists():
        restore_rng_state(load_file(generators), accelerator.device)


def publish(unfinished: Path, target: Path) -> None:
    """Give a finished folder its name: its files reach the disk first, and an older folder of that name makes way."""
    for weights in unfinished.rglob("*.safetensors"):  # written for their owner alone, unlike the files beside them
        weights.chmod((unfinished / "config.json").stat().st_mode)
    for path in [*unfinished.rglob("*"), unfinished]:
        fsync(path)
    if target.exists():
        replaced = target.with_name(f".replaced-{target.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        unfinished.rename(target)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(target)
    fsync(target.parent)


def _nested(flat: dict[str, torch.Tensor]) -> _Moments:
    state: _Moments = {}
    for key, tensor in flat.items():
        name, moment = key.rsplit("/", 1)
        state.setdefault(name, {})[moment] = tensor
    return state
