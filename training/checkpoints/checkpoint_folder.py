"""Checkpoints: model folders that load with `from_pretrained`, with the training state that a resume needs.

    checkpoints/step-000500/                    config.json, model.safetensors, tokenizer.json, …
    checkpoints/step-000500/training_state/     trainer_state.json, optimizer.safetensors, rng_state_0.safetensors, …

A checkpoint is written under another name and renamed when it is complete, so the newest `step-*` folder is always
intact. Older ones are removed only after that. Nothing is pickled. A resume verifies `training_state/SHA256SUMS`; by
hand: `sha256sum --check training_state/SHA256SUMS`.
"""

import contextlib
import copy
import filecmp
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedModel

from common.atomic_files import PARTIAL_SUFFIX, fsync
from common.cli_errors import InputError, one_line, os_error_message
from common.json_files import instance_of, read_json_object
from gpt2_scratch.source_folder import LOADING_ERRORS
from training.checkpoints.checksums import find_corruption, write_checksums
from training.checkpoints.state_snapshot import Snapshot, bare_model, restore_rng_state
from training.data.tokenization.tokenizer import Tokenizer

_NAME = re.compile(r"step-(0[0-9]{5}|[1-9][0-9]{5,})")
_FORMAT_VERSION = 1
_TEMPORARY = (".unfinished-", ".removed-", ".replaced-")  # prefixes of folders that are being written or removed


@dataclass(frozen=True)
class TrainerState:
    """The position of a run, and what a resumed run must match."""

    step: int
    tokens: int
    tokenizer_fingerprint: str
    shards: list[str]
    recipe: dict[str, Any]
    num_processes: int

    def write(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint folder."""
        values = {"format_version": _FORMAT_VERSION, **asdict(self)}
        path = checkpoint / "training_state" / "trainer_state.json"
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> "TrainerState":
        """Return the state in a checkpoint folder.

        Raises:
            InputError: the folder is not a checkpoint of this kit, or has another format.
        """
        path = checkpoint / "training_state" / "trainer_state.json"
        try:
            values = read_json_object(path)
            version = values.pop("format_version", None)
            state = instance_of(cls, values) if version == _FORMAT_VERSION else None
        except (FileNotFoundError, NotADirectoryError):
            advice = "pass a folder such as runs/quickstart/checkpoints/step-000500"
            raise InputError(
                f"{checkpoint} is not a checkpoint: it has no {path.relative_to(checkpoint)}; "
                + _advice(checkpoint, otherwise=advice)
            ) from None
        except ValueError as error:
            raise InputError(
                f"checkpoint {checkpoint} is corrupted: trainer_state.json cannot be read ({one_line(error, 120)}); "
                + _advice(checkpoint)
            ) from None
        except OSError as error:
            raise InputError(os_error_message(error) or f"cannot read {path} ({error})") from None
        if state is None:
            raise InputError(
                f"checkpoint {checkpoint} has format_version {version!r:.40}, but this version of the kit reads "
                f"{_FORMAT_VERSION}; resume with the version that wrote it"
            )
        return state


def check_intact(checkpoint: Path, step: int, *, read_files: bool) -> None:
    """Raise an `InputError` if a checkpoint is not as it was saved after `step`.

    If a file is missing or, with `read_files`, corrupted, the error names it and the newest older checkpoint that is
    intact. If the checkpoint was renamed, the error gives the right name.
    """
    corruption = find_corruption(checkpoint, read_files=read_files)
    if corruption is not None:
        raise InputError(f"checkpoint {checkpoint} is corrupted: {corruption}; {_advice(checkpoint)}")
    if _NAME.fullmatch(checkpoint.name) and step_of(checkpoint) != step:
        raise InputError(f"checkpoint {checkpoint} holds step {step:,}; rename it to step-{step:06d}")


def _advice(
    checkpoint: Path, otherwise: str = "no older checkpoint is intact: start again in another output_dir"
) -> str:
    """Return what to do instead of resuming from a corrupted checkpoint."""
    siblings = checkpoints(checkpoint.parent.parent)
    older = siblings[: siblings.index(checkpoint)] if checkpoint in siblings else []
    intact = next((path for path in reversed(older) if find_corruption(path) is None), None)
    if intact is None:
        return otherwise
    return f"resume from the newest intact one: --resume_from_checkpoint {intact}"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; empty folders are not ours."""
    folder = output_dir / "checkpoints"
    named = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    found = [path for path in named if not path.is_dir() or any(path.iterdir())]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class and configuration without weights, for writing model folders.

    Writing changes the configuration and reads the class's source. Neither is safe on the model that is training.
    """
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    return skeleton


def write_checkpoint(
    output_dir: Path, state: TrainerState, snapshot: Snapshot, *, skeleton: PreTrainedModel, tokenizer: Tokenizer
) -> Path:
    """Write the checkpoint of `state.step`, and return its folder, which has a temporary name until `publish`."""
    target = checkpoint_folder(output_dir, state.step)
    folder = target.with_name(f".unfinished-{target.name}")
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
    return folder


def remove_leftovers(output_dir: Path) -> None:
    """Remove the temporary files and folders of a run that was killed during a save."""
    for folder in (output_dir, output_dir / "checkpoints"):
        for prefix in _TEMPORARY:
            for leftover in folder.glob(f"{prefix}*"):
                shutil.rmtree(leftover, ignore_errors=True)
    for leftover in output_dir.glob(f"*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def remove_old_checkpoints(output_dir: Path, *, keep: int | None, keep_every: int | None = None) -> None:
    """Remove checkpoints, except the newest `keep` (None: all) and those at multiples of `keep_every` steps."""
    for old in checkpoints(output_dir)[: -keep if keep else 0]:
        if keep_every and step_of(old) % keep_every == 0:
            continue
        # A partly removed folder must not look like a checkpoint.
        removed = old.with_name(f".removed-{old.name}")
        with contextlib.suppress(OSError):  # the next save retries
            old.rename(removed)
            shutil.rmtree(removed)


def is_model_of(checkpoint: Path, output_dir: Path) -> bool:
    """Return whether model/ has the checkpoint's weights; it is older if the run was extended and then stopped."""
    ours, theirs = (folder / "model.safetensors" for folder in (output_dir / "model", checkpoint))
    return ours.is_file() and theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)


def load_checkpoint(
    checkpoint: Path,
    *,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loop_state: Mapping[str, torch.Tensor],
) -> None:
    """Load a checkpoint's optimizer state, loop state and random-number generators. The model has its weights already.

    The tensors of `loop_state` are filled in place. With another number of processes, ranks without a saved generator
    keep a fresh one: dropout differs there, and the data stay the same.

    Raises:
        InputError: the state is not that of this model and optimizer.
    """
    folder = checkpoint / "training_state"
    generators = folder / f"rng_state_{accelerator.process_index}.safetensors"
    try:
        loop = load_file(folder / "loop_state.safetensors")
        _load_moments(folder / "optimizer.safetensors", bare_model(accelerator, model), optimizer)
        for name in loop_state.keys() & loop.keys():
            loop_state[name].copy_(loop[name])
        if generators.exists():
            restore_rng_state(load_file(generators), accelerator.device)
    except LOADING_ERRORS as error:
        raise InputError(
            f"checkpoint {checkpoint} cannot be loaded ({one_line(error, 120)}); {_advice(checkpoint)}"
        ) from error


def _load_moments(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the optimizer's state of every parameter. The parameter groups come from the recipe."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[p] for p in group["params"]]} for group in optimizer.param_groups]
    moments: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in load_file(path).items():
        name, moment = key.rsplit("/", 1)
        moments[name][moment] = tensor
    state: dict[str, Any] = {"state": dict(moments), "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def publish(partial: Path, target: Path) -> None:
    """Rename a complete folder to `target`, and replace an older one. Its files are synced to disk first."""
    for weights in partial.rglob("*.safetensors"):  # safetensors creates them readable by the owner only
        weights.chmod((partial / "config.json").stat().st_mode)
    for path in [*partial.rglob("*"), partial]:
        fsync(path)
    replaced = target.with_name(f".replaced-{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    fsync(target.parent)
