"""Checkpoints: model folders that load with `from_pretrained`, each with the training state to go on from.

    checkpoints/step-000500/                    config.json, model.safetensors, tokenizer.json, …
    checkpoints/step-000500/training_state/     trainer_state.json, optimizer.safetensors, rng_state_0.safetensors, …

A checkpoint is written under another name and renamed when whole, so the newest `step-*` folder is always good, and
older ones are removed only after that. Nothing is pickled.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel

from gpt2_scratch_errors import InputError
from training.atomic import sync
from training.data.tokenizer import Tokenizer

_NAME = re.compile(r"step-(\d{6,})")
_Moments = dict[str, dict[str, torch.Tensor]]  # by parameter and moment
_WHOLE_OPTIMIZER = StateDictOptions(full_state_dict=True, cpu_offload=True)


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


def save_checkpoint(
    output_dir: Path,
    state: TrainerState,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    keep: int | None,
) -> Path:
    """Write the checkpoint of `state.step`, then remove all but the newest `keep`; called by all processes together.

    Returns:
        The checkpoint's folder, whole on disk.
    """
    target = checkpoint_folder(output_dir, state.step)
    unfinished = target.with_name(f".unfinished-{target.name}")
    training_state = unfinished / "training_state"
    bare = bare_model(accelerator, model)
    optimizer_state = get_optimizer_state_dict(bare, optimizer, options=_WHOLE_OPTIMIZER)
    if accelerator.is_main_process:
        for dead in target.parent.glob(".unfinished-*"):  # of a save that was killed
            shutil.rmtree(dead)
        training_state.mkdir(parents=True)
        save_model(unfinished, bare, tokenizer)
        save_file(_flat(cast(_Moments, optimizer_state["state"])), training_state / "optimizer.safetensors")
        (training_state / "trainer_state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
    accelerator.wait_for_everyone()
    save_file(_rng_state(accelerator.device), training_state / f"rng_state_{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(unfinished, target)
        for old in checkpoints(output_dir)[: -keep if keep else 0]:
            if old != target:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(checkpoint: Path, *, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's optimizer state and random-number generators in place; its weights are loaded with the model.

    On another number of processes than it was saved with, processes without a generator of their own keep a fresh one,
    so dropout differs there while the data stay the same.
    """
    folder = checkpoint / "training_state"
    bare = bare_model(accelerator, model)
    try:
        flat = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {checkpoint} has no readable optimizer state ({error}); take an older one"
        ) from None
    # The groups are the recipe's, as the optimizer was just built; only the moments come from the checkpoint.
    names = {parameter: name for name, parameter in bare.named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    state: dict[str, Any] = {"state": _nested(flat), "param_groups": groups}
    set_optimizer_state_dict(bare, optimizer, state, options=_WHOLE_OPTIMIZER)
    generators = folder / f"rng_state_{accelerator.process_index}.safetensors"
    if generators.exists() or TrainerState.read(checkpoint).num_processes == accelerator.num_processes:
        try:
            _restore_rng_state(load_file(generators), accelerator.device)
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"checkpoint {checkpoint} has no readable {generators.name} ({error})") from None


def bare_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """The model without what `prepare` and `torch.compile` wrapped around it."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def save_model(folder: Path, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Write a model folder: weights, config, generation config, tokenizer, and the code for `trust_remote_code`."""
    model.save_pretrained(folder)
    tokenizer.save(folder, model_max_length=model.config.n_positions)


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


def _flat(state: _Moments) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{moment}": tensor.contiguous() for name, moments in state.items() for moment, tensor in moments.items()
    }


def _nested(flat: dict[str, torch.Tensor]) -> _Moments:
    state: _Moments = {}
    for key, tensor in flat.items():
        name, moment = key.rsplit("/", 1)
        state.setdefault(name, {})[moment] = tensor
    return state


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
