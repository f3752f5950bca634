"""Validation: the loss on held-out text, in nats per token and bits per byte."""

import gzip
import math
from collections.abc import Iterable

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoints.signals import Coordinator
from training.data.loading.loader import IGNORED, validation_batches, validation_windows
from training.data.shards.shard_reader import Shard
from training.data.tokenization.tokenizer import Tokenizer
from training.monitoring.monitor import Monitor, PeriodicEvaluation
from training.step.hooks import Run
from training.step.train_step import model_inputs


class Validation(PeriodicEvaluation):
    """Validates the model every `eval_steps`, on `text`."""

    def __init__(self, run: Run, monitor: Monitor, coordinator: Coordinator) -> None:
        super().__init__(monitor, run.recipe.eval_steps, {"val_loss"})
        self._coordinator = coordinator
        recipe, shard = run.recipe, run.shards.folder.val_shard
        windows = validation_windows(shard, seq_len=recipe.seq_len, eval_tokens=recipe.eval_tokens)
        self.text = ScoredText(shard, run.tokenizer, windows=windows, seq_len=recipe.seq_len)

    def evaluate(self, run: Run) -> None:
        """Score the validation text on all ranks."""
        recipe, accelerator = run.recipe, run.accelerator
        batches = validation_batches(
            run.shards.folder.val_shard,
            seq_len=recipe.seq_len,
            eval_tokens=recipe.eval_tokens,
            batch_size=run.batch.per_device,
            vocab_size=run.tokenizer.vocab_size,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        with run.pause():
            loss, tokens = validation_loss(
                accelerator,
                run.model,
                self._coordinator.checking_stop(batches),
                end_of_text_id=run.document_mark,
            )
        bits_per_byte = self.text.bits_per_byte(loss)
        self._monitor.record(
            run,
            {"val_loss": loss, "val_tokens": tokens, "bits_per_byte": bits_per_byte},
            f"validation loss {loss:.4f} nats per token, {bits_per_byte:.4f} bits per byte",
        )


class ScoredText:
    """The text that a validation scores: that of the first `windows` windows of a validation shard."""

    def __init__(self, shard: Shard, tokenizer: Tokenizer, *, windows: int, seq_len: int) -> None:
        self.tokens = np.asarray(shard.read()[1 : windows * seq_len + 1])  # the targets in order, one-dimensional ids
        self.byte_count = int(tokenizer.token_byte_lengths()[self.tokens].sum())  # end-of-text tokens have none

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Bits per byte of a model with this mean loss, including its loss on end-of-text tokens."""
        return nats_per_token * len(self.tokens) / (math.log(2) * self.byte_count)

    def gzip_bits_per_byte(self, tokenizer: Tokenizer) -> float:
        """Bits per byte of `gzip -9` on the same text, with documents separated by a newline."""
        documents = np.split(self.tokens, np.flatnonzero(self.tokens == tokenizer.end_of_text_id))
        text = b"\n".join(tokenizer.decode_bytes(part[part != tokenizer.end_of_text_id].tolist()) for part in documents)
        return 8 * len(gzip.compress(text, compresslevel=9)) / self.byte_count


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    end_of_text_id: int | None = None,
) -> tuple[float, int]:
    """Mean loss in nats per token over all ranks' batches, and the number of tokens.

    Every token has the same weight: losses and tokens are summed over batches and ranks, and divided once.
    """
    was_training = model.training
    model.eval()
    one = torch.ones((), device=accelerator.device)
    losses, tokens = [torch.zeros((), device=accelerator.device)], 0  # a rank may have no tokens
    try:
        for inputs, targets in batches:
            on_device = model_inputs((inputs, targets), accelerator.device, end_of_text_id)
            losses.append(model(**on_device, num_items_in_batch=one, use_cache=False).loss.float())
            tokens += int((targets != IGNORED).sum())
    finally:
        model.train(was_training)
    # A batch's sum is exact enough in fp32. The sum of thousands of batches is taken in fp64, on the host because MPS
    # has no fp64.
    total = torch.stack(losses).cpu().double().sum()
    sums = torch.stack([total, torch.tensor(tokens, dtype=torch.float64)])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    return (sums[0] / sums[1]).item(), int(sums[1].item())
