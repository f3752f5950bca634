"""One optimizer step, and one validation, over all processes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from training.data.loading.loader import IGNORED
from training.step.document_mask import document_positions
from training.step.guard import skip_update_if


class StepResult(NamedTuple):
    """Mean loss of the step over all processes, and the gradient's norm before clipping: scalars on the device.

    They stay there: reading them waits for the device, which only a logged step does.
    """

    loss: Tensor
    grad_norm: Tensor


def model_inputs(
    batch: tuple[Tensor, Tensor], device: torch.device, end_of_text_id: int | None = None
) -> dict[str, Tensor]:
    """A batch as the model takes it; with an `end_of_text_id`, positions keep its documents apart."""
    inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    if end_of_text_id is None:
        return {"input_ids": inputs, "shift_labels": targets}
    return {
        "input_ids": inputs,
        "shift_labels": targets,
        "position_ids": document_positions(inputs, end_of_text_id),
    }


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    accumulation_steps: int,
    learning_rate: float,
    max_grad_norm: float,
    end_of_text_id: int | None = None,
    judge: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> StepResult:
    """Take `accumulation_steps` batches, average their gradients over all processes, clip, and update the weights.

    The update is left out where `judge`, given loss and norm, returns 1 (`training.step.guard`). Nothing here waits for
    the device.
    With an `end_of_text_id`, documents are kept apart (`training.step.document_mask`).
    All windows are full, so the plain mean over batches and processes is the mean over the step's tokens.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(accumulation_steps):
        inputs = model_inputs(next(batches), accelerator.device, end_of_text_id)
        # Gradients are exchanged once, in the last backward pass.
        last = micro_step == accumulation_steps - 1
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = model(**inputs, use_cache=False)
            scaled = outputs.loss / accumulation_steps
            accelerator.backward(scaled)
        loss += scaled.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if isinstance(grad_norm, DTensor):  # of weights that are sharded
        grad_norm = grad_norm.full_tensor()
    mean_loss = accelerator.reduce(loss, reduction="mean")
    if judge is not None:
        skip_update_if(judge(mean_loss, grad_norm), optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean_loss, grad_norm)


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    end_of_text_id: int | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Mean loss in nats per token over all processes' batches, and the number of tokens it is the mean of.

    Every token counts alike: sums of losses and of tokens are added up, never means of batches. `between_batches` is
    called on every process equally often, and may raise.
    """
    was_training = model.training
    model.eval()
    one = torch.ones((), device=accelerator.device)
    losses, tokens = [torch.zeros((), device=accelerator.device)], 0
    try:
        for inputs, targets in batches:
            if len(losses) > 1:  # of batches before; a process may have no tokens of its own
                between_batches()
            on_device = model_inputs((inputs, targets), accelerator.device, end_of_text_id)
            losses.append(model(**on_device, num_items_in_batch=one, use_cache=False).loss.float())
            tokens += int((targets != IGNORED).sum())
    finally:
        model.train(was_training)
    # Batch sums are exact to fp32; their sum over thousands of batches is taken in fp64, on the host since MPS has
    # none.
    total = torch.stack(losses).cpu().double().sum()
    sums = torch.stack([total, torch.tensor(tokens, dtype=torch.float64)])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    return (sums[0] / sums[1]).item(), int(sums[1].item())
