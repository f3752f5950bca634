"""What is known of a run before anything heavy is built, and everything that can be refused by then."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from gpt2_scratch_errors import InputError
from training.batch import BatchPlan, plan_batch
from training.checkpoint import TrainerState, find_resume_point
from training.data.loader import validation_windows
from training.data.manifest import manifest_path
from training.data.order import Order
from training.data.producer import produce
from training.data.shards import ShardFolder, holds_foreign_shards
from training.data.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What is known of a run before anything heavy is built.

    Attributes:
        recipe: every knob.
        folder: the shards.
        tokenizer: the shards' tokenizer.
        order: the order in which their windows are drawn.
        batch: how a step falls on processes and forward passes.
        total_steps: where the run ends.
        resume_from: the checkpoint to go on from.
        first_step: steps that it has behind it.
    """

    recipe: Recipe
    folder: ShardFolder
    tokenizer: Tokenizer
    order: Order
    batch: BatchPlan
    total_steps: int
    resume_from: Path | None
    first_step: int

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output_dir)

    @property
    def is_complete(self) -> bool:
        """Whether an earlier start took the last step and left the model folder."""
        return self.first_step >= self.total_steps and (self.output_dir / "model").is_dir()


def plan_run(recipe: Recipe) -> Plan:
    """Check the recipe against the output folder, the data and the number of processes, preparing the data when needed.

    Raises:
        InputError: whatever would make the run fail, or another run than was asked for.
    """
    resume_from = find_resume_point(recipe)
    batch = plan_batch(
        tokens_per_step=recipe.tokens_per_step,
        seq_len=recipe.seq_len,
        per_device=recipe.per_device_train_batch_size,
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
    )
    folder, tokenizer = open_data(recipe)
    validation_windows(folder.val_shard, seq_len=recipe.seq_len, eval_tokens=recipe.eval_tokens)
    try:
        order = Order([shard.tokens for shard in folder.train_shards], seq_len=recipe.seq_len, seed=recipe.seed)
    except ValueError as error:
        raise InputError(
            f"{recipe.data_dir}: {error}; prepare a larger corpus, or train with a shorter seq_len"
        ) from None
    first_step = 0
    if resume_from is not None:
        state = TrainerState.read(resume_from)
        _refuse_other_data(state, folder, tokenizer, recipe.data_dir)
        first_step = state.step
    return Plan(recipe, folder, tokenizer, order, batch, total_steps(recipe, order), resume_from, first_step)


def open_data(recipe: Recipe) -> tuple[ShardFolder, Tokenizer]:
    """The recipe's shards and their tokenizer; one process of each node first fills a folder that is not complete.

    Raises:
        InputError: the corpus, the folder or the tokenizer cannot be used, or do not go together.
    """
    path = Path(recipe.data_dir)
    if holds_foreign_shards(path):
        if parse_train_spec(recipe.tokenizer) is not None:
            raise InputError(
                f"{path} holds ready shards without a manifest, so tokenizer {recipe.tokenizer} cannot be trained for "
                "them; name the tokenizer that they were made with, such as gpt2"
            )
        folder, tokenizer = ShardFolder.open(path), load_tokenizer(recipe.tokenizer)
        # A look at the beginning: every id of a large corpus would take minutes, and the loader checks as it goes.
        folder.check_ids(tokenizer.vocab_size, [folder.val_shard, *folder.train_shards[:1]])
        return folder, tokenizer
    if os.environ.get("LOCAL_RANK", "0") == "0":
        folder = produce(
            path,
            corpus=recipe.corpus,
            corpus_config=recipe.corpus_config,
            text_field=recipe.text_field,
            tokenizer=recipe.tokenizer,
            shard_tokens=recipe.shard_tokens,
            val_tokens=recipe.validation_shard_tokens,
        )
    else:
        folder = _wait_for_shards(path)
    return folder, Tokenizer.load(path)


def _wait_for_shards(path: Path) -> ShardFolder:
    """The folder that another process of this node fills, once it is complete; that process tells how far it is."""
    while not (manifest_path(path).exists() and ShardFolder.open(path).complete):
        time.sleep(1.0)
    return ShardFolder.open(path)


def total_steps(recipe: Recipe, order: Order) -> int:
    """Optimizer steps of the whole run; a length in tokens or epochs is cut to whole steps."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    if recipe.max_tokens is not None:
        steps = recipe.max_tokens // recipe.tokens_per_step
    else:
        epochs = recipe.num_train_epochs or 0.0
        whole = sum(order.windows_in_epoch(epoch) for epoch in range(int(epochs)))
        part = int((epochs - int(epochs)) * order.windows_in_epoch(int(epochs)))
        steps = (whole + part) * recipe.seq_len // recipe.tokens_per_step
    if not steps:
        raise InputError(
            f"the run is shorter than one step of tokens_per_step={recipe.tokens_per_step:,}; "
            "make the run longer or the step smaller"
        )
    return steps


def _refuse_other_data(state: TrainerState, folder: ShardFolder, tokenizer: Tokenizer, data_dir: str) -> None:
    if state.tokenizer_fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"data_dir {data_dir} was made with another tokenizer than the checkpoint's run; name that run's data"
        )
    if state.shards != shard_identities(folder):
        raise InputError(f"data_dir {data_dir} holds other shards than the checkpoint's run; name that run's data")


def shard_identities(folder: ShardFolder) -> list[str]:
    """What a checkpoint remembers of its shards: their hashes, or their sizes where no manifest has any."""
    return [shard.sha256 or f"{shard.tokens} tokens" for shard in [folder.val_shard, *folder.train_shards]]
