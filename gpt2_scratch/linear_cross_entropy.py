"""Language-modeling head and cross entropy, computed in chunks that never hold the logits of all tokens.

The logits are by far the largest tensor of a language model: in fp32, 0.8 GB for 4,096 tokens and a vocabulary of
50,257. Here the forward pass computes each chunk's loss, summed in fp32, and the gradients of hidden states and weight.
The backward pass only scales them. This keeps the three matrix products and saves most memory traffic. On two cores
with bf16 autocast, forward and backward take a third (8,192 tokens, vocabulary 4,096) to a quarter (4,096 tokens,
vocabulary 50,257) of the time of `F.cross_entropy`.

Gradients in the forward pass are an idea of Liger-Kernel (Hsu et al. 2024); not storing logits is one of "Cut Your
Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens per chunk. The value for CPUs is the fastest measured for vocabularies of 4,096 and 50,257: smaller chunks add
# up the weight's gradient more often, larger ones cause more page faults.
_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits held in fp32. Fewer would fit a CPU's cache and gain 5 % on idle cores, but lose far more on shared cores,
# where threads wait for each other at every small step.
_SOFTMAX_LOGITS = {"cpu": 2**22, "cuda": 2**27}


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return `F.cross_entropy((hidden_states @ weight.T).float(), targets)`, an fp32 scalar, with less memory.

    Under autocast the products run in its dtype; the weight's gradient is summed over chunks in fp32. Under
    `torch.compile` the plain expression is used, which the compiler fuses.

    Args:
        hidden_states: (..., n_embd).
        weight: (vocab_size, n_embd).
        targets: (...) token ids, already shifted.
        ignore_index: targets of this value are ignored.
        reduction: "sum", or "mean" over the targets that are not ignored (NaN if there are none).

    Raises:
        ValueError: another reduction, or targets of the wrong shape.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', found {reduction!r}")
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {tuple(hidden_states.shape[:-1])}, found {tuple(targets.shape)}; "
            "give one target per hidden state"
        )
    hidden_states, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    if torch.compiler.is_compiling() or hidden_states.device.type == "meta":
        logits = F.linear(hidden_states, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    needs_gradient = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, weight)]
    total = _SummedCrossEntropy.apply(hidden_states, weight, targets, ignore_index, *needs_gradient)
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    # 0 / 0 would make the gradients NaN too, but those of `F.cross_entropy` are zero.
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("nan"))


class _SummedCrossEntropy(torch.autograd.Function):
    """The summed loss. The forward pass computes its gradients; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> Tensor:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        ctx.dtypes = hidden_states.dtype, weight.dtype
        with torch.autocast(device, enabled=False):
            loss, *gradients = _loss_and_gradients(
                hidden_states.to(dtype), weight.to(dtype), targets, ignore_index, needs_hidden, needs_weight
            )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # Scaled in fp32 and rounded once, because bf16 cannot hold most factors, such as 1 / count for a mean.
            precise = torch.promote_types(dtype, torch.float32)
            scaled.append(None if gradient is None else (gradient.to(precise) * upstream).to(dtype))
        return (*scaled, None, None, None, None)


def _loss_and_gradients(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the summed loss and its gradients for hidden states and weight (fp32), None where not needed.

    A frozen head, as in LoRA, costs two matrix products instead of three.
    """
    tokens, vocab_size = len(hidden_states), len(weight)
    kind = hidden_states.device.type
    chunk = max(1, min(tokens, _CHUNK_TOKENS.get(kind, 4096)))
    rows = min(chunk, max(1, _SOFTMAX_LOGITS.get(kind, 2**27) // vocab_size))

    counted = targets != ignore_index
    targets = torch.where(counted, targets, 0).unsqueeze(1)
    counted = counted.unsqueeze(1)
    losses = torch.empty(tokens, 1, dtype=torch.float32, device=hidden_states.device)
    logits_buffer = hidden_states.new_empty(chunk, vocab_size)
    softmax_buffer = torch.empty(rows, vocab_size, dtype=torch.float32, device=hidden_states.device)
    hidden_gradient = torch.empty_like(hidden_states) if needs_hidden else None
    weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    product = torch.empty_like(weight) if needs_weight else None

    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = logits_buffer[: part.stop - start]
        torch.mm(hidden_states[part], weight.t(), out=logits)
        for first in range(start, part.stop, rows):
            subset = slice(first, min(first + rows, part.stop))
            block = logits[first - start : subset.stop - start]
            probabilities = softmax_buffer[: len(block)]
            probabilities.copy_(block)
            target_logits = probabilities.gather(1, targets[subset])
            maximum = probabilities.amax(1, keepdim=True)
            torch.softmax(probabilities, 1, out=probabilities)
            # The largest probability is exp(0) / sum, which gives the sum without another exp.
            torch.sub(maximum - target_logits, probabilities.amax(1, keepdim=True).log_(), out=losses[subset])
            if needs_hidden or needs_weight:
                # d loss / d logits = probabilities - one_hot(target)
                probabilities.scatter_add_(1, targets[subset], torch.full_like(target_logits, -1.0))
                probabilities.mul_(counted[subset])
                block.copy_(probabilities)
        if hidden_gradient is not None:
            torch.mm(logits, weight, out=hidden_gradient[part])
        if weight_gradient is not None:
            weight_gradient.add_(torch.mm(logits.t(), hidden_states[part], out=product))

    loss = losses.masked_fill_(~counted, 0.0).sum()
    return loss, hidden_gradient, weight_gradient
