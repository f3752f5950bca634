"""One optimizer step over all processes."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from training.step.guard import Guard, skip_update_if, unwrapped


class StepResult(NamedTuple):
    """The outcome of a step; the tensors are scalars on the device, and reading one waits for the device."""

    loss: Tensor  # mean over all ranks
    grad_norm: Tensor  # global norm before clipping
    learning_rate: float


def model_inputs(
    batch: tuple[Tensor, Tensor],
    device: torch.device,
    end_of_text_id: int | None = None,
    seq_len: int | None = None,
) -> dict[str, Tensor]:
    """The model's keyword arguments for a batch.

    Args:
        batch: inputs and targets (batch, window).
        end_of_text_id: positions restart at this token; None: they do not restart.
        seq_len: windows are cut into sequences of this length; None: they stay as they are.
    """
    inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
    if seq_len is not None:
        inputs, targets = inputs.reshape(-1, seq_len), targets.reshape(-1, seq_len)
    arguments = {"input_ids": inputs, "shift_labels": targets}
    if end_of_text_id is not None:
        arguments["position_ids"] = document_positions(inputs, end_of_text_id)
    return arguments


def document_positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """Positions (batch, seq) that restart at each end-of-text token, which starts a document.

    The rest of a document that began before the window counts from 0 too. Given positions that restart,
    `create_causal_mask` of transformers builds the mask between documents: a block mask for flex attention, which skips
    blocks, or a dense one for sdpa and eager, which costs (batch, 1, seq, seq) of memory and the fast causal kernel.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = torch.where(input_ids == end_of_text_id, positions, 0).cummax(dim=-1).values
    return positions - starts


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    accumulation_steps: int,
    learning_rate: float,
    max_grad_norm: float,
    seq_len: int | None = None,
    end_of_text_id: int | None = None,
    guard: Guard | None = None,
) -> StepResult:
    """Accumulate gradients over `accumulation_steps` batches, average them over ranks, clip, and update the weights.

    Nothing here waits for the device: the guard decides on the device whether the update is skipped. All windows are
    full, so the plain mean over batches and ranks is the mean over the step's tokens.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
    loss = torch.zeros((), device=accelerator.device)
    for micro_step in range(accumulation_steps):
        inputs = model_inputs(next(batches), accelerator.device, end_of_text_id, seq_len)
        # Ranks exchange gradients once, in the last backward pass.
        last = micro_step == accumulation_steps - 1
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = model(**inputs, use_cache=False)
            scaled = outputs.loss / accumulation_steps
            accelerator.backward(scaled)
        loss += scaled.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    if isinstance(grad_norm, DTensor):  # the weights are sharded
        grad_norm = grad_norm.full_tensor()
    mean_loss = accelerator.reduce(loss, reduction="mean")
    scaler = accelerator.scaler
    if guard is not None:
        skip_update_if(guard.check(mean_loss, grad_norm), optimizer)
    elif scaler is not None:
        skip_update_if((~grad_norm.isfinite()).float(), optimizer)
    # accelerate's wrapper would replace the guard's flag by the scaler's.
    unwrapped(optimizer).step()
    if scaler is not None:
        scaler.update()  # `clip_grad_norm_` has looked for overflows
    # DDP's gradients are views of the buckets that ranks exchange; new ones would need memory of their own.
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    return StepResult(mean_loss, grad_norm, learning_rate)
