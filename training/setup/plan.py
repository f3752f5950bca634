"""The plan of a run: everything that is known, and every error that can be found, before the model is built."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.atomic_files import file_sha256
from common.cli_errors import InputError
from common.folder_lock import locked
from common.ranks import Ranks
from training.checkpoints.checkpoint_folder import TrainerState, is_model_of
from training.checkpoints.checksums import state_checksum
from training.checkpoints.resume import check_end, check_writable, find_resume_point, refuse_other_data
from training.data.loading.loader import TrainingShards, validation_windows
from training.data.loading.order import Order
from training.data.producing.background_producer import BackgroundProducer
from training.data.shards.shard_reader import Shard, ShardFolder
from training.data.tokenization.tokenizer import Tokenizer
from training.hub.publisher import claim_repository
from training.monitoring.task_evaluation import TaskSet
from training.recipe import Recipe
from training.setup.accelerator import has_several_nodes
from training.setup.training_data import open_data
from training.step.batch_plan import BatchPlan, plan_batch
from training.step.hooks import Run

_ROOT = Path(__file__).parents[2]
SOURCES = ("common/**/*.py", "gpt2_scratch/**/*.py", "evaluation/**/*.py", "training/**/*.py")
_COMPARED_IDS = 1 << 20  # of a shard without a hash in a manifest


class Plan(NamedTuple):
    """A run before its model is built, and what its hooks need."""

    run: Run
    tasks: TaskSet | None  # None without eval_tasks
    repo_id: str | None  # of the Hub repository that rank 0 pushes to
    is_complete: bool  # an earlier start took the last step and wrote the model folder


def plan_run(
    recipe: Recipe,
    producer: BackgroundProducer,
    *,
    lock: contextlib.ExitStack | None = None,
    gather_object: Callable[[list[Any]], list[Any]] | None = None,
) -> Plan:
    """Check the recipe against the run folder, the data and the processes, and plan the run.

    With `lock`, rank 0 first locks the run folder until that is closed: another start might still write or remove
    checkpoints. If the shard folder is incomplete, the producer is started, and this returns when training can start.
    `gather_object` (as in `Ranks`) is called only if there are several nodes.

    Raises:
        InputError: the run would fail, or would not be the run that the recipe describes.
    """
    several_nodes = has_several_nodes()
    # On one node, the launcher ends all processes when one fails.
    ranks = Ranks(gather_object if several_nodes else None)
    with ranks.share_errors():
        if lock is not None and os.environ.get("RANK", "0") == "0":
            check_writable(Path(recipe.output_dir))
            lock.enter_context(locked(Path(recipe.output_dir)))
        plan = _plan(recipe, producer, ranks)
        if several_nodes:
            check_nodes_match(_identity(plan), ranks)
    return plan


def _plan(recipe: Recipe, producer: BackgroundProducer, ranks: Ranks) -> Plan:
    resume_from = find_resume_point(recipe)
    batch = batch_of(recipe)
    # Before the data, which may take minutes.
    repo_id = None
    if recipe.push_to_hub and os.environ.get("RANK", "0") == "0" and not _is_finished(recipe, resume_from):
        repo_id = claim_repository(recipe, resumes=resume_from is not None)
    folder, tokenizer = open_data(recipe, producer, ranks)
    shards = check_shards(recipe, folder, tokenizer)
    end, first_step = total_steps(recipe, shards.order), 0
    if resume_from is not None:
        state = TrainerState.read(resume_from)
        refuse_other_data(state, folder, tokenizer, recipe)
        first_step = state.step
        check_end(resume_from, first_step, end)
    tasks = TaskSet(recipe, tokenizer) if recipe.eval_tasks else None
    run = Run(recipe, shards, tokenizer, batch, first_step, end, resume_from)
    is_complete = first_step == end and resume_from is not None and is_model_of(resume_from, run.output_dir)
    return Plan(run, tasks, repo_id, is_complete)


def check_shards(recipe: Recipe, folder: ShardFolder, tokenizer: Tokenizer) -> TrainingShards:
    """The folder's training shards, once validation and training can start with them; otherwise an `InputError`."""
    validation_windows(folder.val_shard, seq_len=recipe.seq_len, eval_tokens=recipe.eval_tokens)
    # The first shards only: all of a large corpus would take minutes, and the loader checks what it reads.
    for shard in (folder.val_shard, *folder.train_shards[:1]):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            shard.check_hash()
        shard.check_ids(tokenizer.vocab_size)
    try:
        return TrainingShards(folder, seq_len=recipe.seq_len, seed=recipe.seed)
    except ValueError as error:
        raise InputError(f"{recipe.data_dir}: {error}; prepare a larger corpus, or use a shorter seq_len") from None


def batch_of(recipe: Recipe) -> BatchPlan:
    """How the recipe's step is split across the processes that were launched."""
    per_device = recipe.per_device_train_batch_size
    return plan_batch(
        tokens_per_step=recipe.tokens_per_step,
        seq_len=recipe.seq_len,
        per_device=1 if per_device == "auto" else per_device,
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
    )


def total_steps(recipe: Recipe, order: Order | None) -> int:
    """Optimizer steps of the complete run; a length in tokens or epochs is rounded down to whole steps.

    The order of the windows of all shards is only needed for a length in epochs.

    Raises:
        InputError: the run is shorter than a step.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    if recipe.max_tokens is not None:
        steps = recipe.max_tokens // recipe.tokens_per_step
    else:
        assert order is not None
        epochs = Fraction(repr(recipe.num_train_epochs))  # in decimal; as binary floats, 2.3 - 2 is less than 0.3
        full_epochs = sum(order.windows_in_epoch(epoch) for epoch in range(int(epochs)))
        part = int((epochs - int(epochs)) * order.windows_in_epoch(int(epochs)))
        steps = (full_epochs + part) * recipe.seq_len // recipe.tokens_per_step
    if not steps:
        raise InputError(
            f"the run is shorter than one step of tokens_per_step={recipe.tokens_per_step:,}; "
            "make the run longer or the step smaller"
        )
    return steps


def _is_finished(recipe: Recipe, resume_from: Path | None) -> bool:
    """Whether the run is complete, as far as that is known before its data is read."""
    if resume_from is None or recipe.num_train_epochs is not None:
        return False
    took_last_step = TrainerState.read(resume_from).step == total_steps(recipe, None)
    return took_last_step and is_model_of(resume_from, Path(recipe.output_dir))


def check_nodes_match(identity: Mapping[str, object], ranks: Ranks) -> None:
    """Raise an `InputError` if what determines the data and the steps of a run is not the same on all ranks."""
    every_rank = ranks.gather(dict(identity))
    differences = []
    for name in dict.fromkeys(chain.from_iterable(every_rank)):
        values = [str(known.get(name, "missing")) for known in every_rank]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differences.append(f"{name} is {values[0]:.16} on rank 0, {values[other]:.16} on rank {other}")
    if differences:
        raise InputError(
            f"the nodes do not match: {'; '.join(differences)}; give every node the same code, recipe and flags, and "
            "share data_dir and output_dir between them, or copy both to every node"
        )


def _identity(plan: Plan) -> dict[str, object]:
    """Everything known at the start that determines the data, the steps and the initial weights of a run."""
    run, folder = plan.run, plan.run.shards.folder
    names = ("corpus_revision", "dtype", "shard_tokens", "max_tokens")
    weights = run.recipe.init_from if run.resume_from is None else None
    if weights is not None and Path(weights).is_dir():  # otherwise a model on the Hub
        weights = hash_of_files(Path(weights), "*.safetensors", "*.bin")
    return {
        "data: tokenizer": run.tokenizer.fingerprint,
        **{f"data: {name}": getattr(folder.manifest, name, None) for name in names},
        "data: validation shard": _content(folder.val_shard),
        "data: first training shard": _content(folder.train_shards[0]),
        "first step": run.first_step,
        "checkpoint": None if run.resume_from is None else state_checksum(run.resume_from),
        "initial weights": weights,
        "total steps": run.total_steps,
        "complete": plan.is_complete,
        "items of eval_tasks": None if plan.tasks is None else plan.tasks.fingerprint,
        **run.recipe.values_with(per_node=False),
        "code": hash_of_files(_ROOT, *SOURCES),
        "torch": torch.__version__,
    }


def hash_of_files(folder: Path, *patterns: str) -> str:
    """A hash of the names and the content of the files below a folder that match a pattern."""
    paths = sorted(chain.from_iterable(map(folder.glob, patterns)))
    content = (f"{path.relative_to(folder)} {file_sha256(path)}" for path in paths)
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _content(shard: Shard) -> str:
    if shard.sha256 is not None:
        return shard.sha256
    return hashlib.sha256(f"{shard.tokens} ".encode() + shard.read()[:_COMPARED_IDS].tobytes()).hexdigest()
