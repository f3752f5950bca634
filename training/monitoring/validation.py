"""Validation: the loss on held-out text, in nats per token and bits per byte."""

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.checkpoints.signals import Coordinator
from training.data.loading.loader import IGNORED, validation_batches, validation_windows
from training.monitoring.bits_per_byte import ScoredText
from training.monitoring.monitor import Monitor
from training.step.hooks import PeriodicEvaluation, Run
from training.step.train_step import model_inputs


class Validation(PeriodicEvaluation):
    """Validates the model every `eval_steps`.

    Attributes:
        text: the validation text.
        last_step, last_loss: of the last validation of this start.
    """

    def __init__(self, run: Run, monitor: Monitor, coordinator: Coordinator) -> None:
        self._monitor, self._coordinator = monitor, coordinator
        recipe, shard = run.recipe, run.shards.folder.val_shard
        windows = validation_windows(shard, seq_len=recipe.seq_len, eval_tokens=recipe.eval_tokens)
        self.text = ScoredText.of_windows(shard, run.tokenizer, windows=windows, seq_len=recipe.seq_len)
        self.last_step, self.last_loss = -1, math.nan

    def is_due(self, run: Run) -> bool:
        """Every `eval_steps`, and at the end."""
        return run.is_due(run.recipe.eval_steps)

    def is_recorded(self, run: Run) -> bool:
        """Whether metrics.jsonl has a validation of the current step."""
        return any("val_loss" in line and line["step"] == run.step for line in self._monitor.log.history.metrics)

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
        with self._monitor.pause():
            loss, tokens = validation_loss(
                accelerator,
                run.model,
                self._coordinator.checking_stop(batches),
                end_of_text_id=run.document_mark,
            )
        self.last_step, self.last_loss = run.step, loss
        bits_per_byte = self.text.bits_per_byte(loss)
        values = {"step": run.step, "tokens": run.tokens, "val_loss": loss, "val_tokens": tokens}
        self._monitor.log.validation({**values, "bits_per_byte": bits_per_byte})
        self._monitor.plot(run)
        self._monitor.track(run.step, {"val_loss": loss, "bits_per_byte": bits_per_byte})


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
