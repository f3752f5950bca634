"""Checkpoints: model folders that load with `from_pretrained`, each with the training state to go on from.

    checkpoints/step-000500/                    config.json, model.safetensors, tokenizer.json, …
    checkpoints/step-000500/training_state/     trainer_state.json, optimizer.safetensors, rng_state_0.safetensors, …

A checkpoint is written under another name and renamed when whole, so the newest `step-*` folder is always good, and
older ones are removed only after that. Nothing is pickled.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping
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

from gpt2_scratch_errors import InputError
from training.atomic import sync
from training.data.tokenizer import Tokenizer
from training.snapshot import Snapshot, bare_model, restore_rng_state

_NAME = re.compile(r"step-(\d{6,})")
_Moments = dict[str, dict[str, torch.Tensor]]  # by parameter and moment
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

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainerState":
        """The state in a checkpoint folder.

        Raises:
            InputError: the folder is not a checkpoint of ours.
        """
        path = checkpoint / "training_state" / "trainer_state.json"
        try:
            state = cls(**json.loads(path.read_text(encoding="utf-8")))
            if not (isinstance(state.step, int) and isinstance(state.tokens, int) and isinstance(state.recipe, dict)):
                raise TypeError("step, tokens or recipe of another type")
            return state
        except FileNotFoundError:
            raise InputError(
                f"{checkpoint} is not a checkpoint: expected {path.relative_to(checkpoint)} in it; "
                "name a folder such as runs/quickstart/checkpoints/step-000500"
            ) from None
        except (json.JSONDecodeError, TypeError, OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"checkpoint {checkpoint} has a broken trainer_state.json ({error}); take an older one"
            ) from None


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = output_dir / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration without weights, to write model folders with.

    Writing changes the configuration and asks the class for its source: neither is safe with the model in training.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton


def write_checkpoint(
    output_dir: Path, state: TrainerState, snapshot: Snapshot, *, skeleton: PreTrainedModel, tokenizer: Tokenizer
) -> Path:
    """Write the checkpoint of `state.step`; called by the main process alone.

    Returns:
        The checkpoint's folder, whole on disk.
    """
    target = checkpoint_folder(output_dir, state.step)
    unfinished = target.with_name(f".unfinished-{target.name}")
    training_state = unfinished / "training_state"
    for dead in target.parent.glob(".unfinished-*"):  # of a save that was killed
        shutil.rmtree(dead)
    training_state.mkdir(parents=True)
    skeleton.save_pretrained(unfinished, state_dict=dict(snapshot.weights))
    tokenizer.save(unfinished, model_max_length=skeleton.config.n_positions)
    save_file(snapshot.optimizer, training_state / "optimizer.safetensors")
    save_file(snapshot.loop_state, training_state / "loop_state.safetensors")
    for rank, rng_state in enumerate(snapshot.rng_states):
        save_file(rng_state, training_state / f"rng_state_{rank}.safetensors")
    (training_state / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    publish(unfinished, target)
    return target


def remove_old_checkpoints(output_dir: Path, *, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints; None keeps all."""
    for old in checkpoints(output_dir)[: -keep if keep else 0]:
        shutil.rmtree(old)


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
    try:
        flat = load_file(folder / "optimizer.safetensors")
        remembered = load_file(folder / "loop_state.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {checkpoint} has no readable optimizer state ({error}); take an older one"
        ) from None
    # The groups are the recipe's, as the optimizer was just built; only the moments come from the checkpoint.
    names = {parameter: name for name, parameter in bare.named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    state: dict[str, Any] = {"state": _nested(flat), "param_groups": groups}
    set_optimizer_state_dict(bare, optimizer, state, options=_WHOLE)
    for name in loop_state.keys() & remembered.keys():
        loop_state[name].copy_(remembered[name])
    generators = folder / f"rng_state_{accelerator.process_index}.safetensors"
    if generators.exists() or TrainerState.read(checkpoint).num_processes == accelerator.num_processes:
        try:
            restore_rng_state(load_file(generators), accelerator.device)
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"checkpoint {checkpoint} has no readable {generators.name} ({error})") from None


def publish(unfinished: Path, target: Path) -> None:
    """Give a finished folder its name: its files reach the disk first, and an older folder of that name makes way."""
    for weights in unfinished.rglob("*.safetensors"):  # written for their owner alone, unlike the files beside them
        weights.chmod((unfinished / "config.json").stat().st_mode)
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    if target.exists():
        replaced = target.with_name(f".replaced-{target.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        unfinished.rename(target)
        shutil.rmtree(replaced)
    else:
        unfinished.rename(target)
    sync(target.parent)


def _nested(flat: dict[str, torch.Tensor]) -> _Moments:
    state: _Moments = {}
    for key, tensor in flat.items():
        name, moment = key.rsplit("/", 1)
        state.setdefault(name, {})[moment] = tensor
    return state
