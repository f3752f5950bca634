"""LM head and cross entropy in one, without ever holding the logits of all tokens.

The logits of a language model are its largest tensor by far: at a vocabulary of 50,257, 4,096 tokens take 0.8 GB in
fp32, and the plain way writes and reads that several times. Here the tokens go through in chunks. While a chunk's
logits are at hand, its loss is summed up in fp32 and the gradients of hidden states and weight are computed at once,
so the backward pass only scales them. The matrix products stay the same three; most of the memory traffic goes. On two
cores with bf16 autocast, forward and backward take a third (8,192 tokens, vocabulary 4,096) to a quarter (4,096 tokens,
vocabulary 50,257) of the plain way's time.

The idea of gradients in the forward pass is Liger-Kernel's (Hsu et al. 2024), the one of never storing logits that of
"Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens whose logits are held at a time. The value for CPUs is the fastest measured at vocabularies of 4,096 and
# 50,257: fewer, and adding up the weight's gradient costs more; more, and so do the page faults of fresh memory.
_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits that are in fp32 at a time. Less would stay in a CPU's cache and gain 5 % when the cores are idle, but lose far
# more when they are shared, because the two threads then wait for each other at every small step.
_SOFTMAX_LOGITS = {"cpu": 2**22, "cuda": 2**27}


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return `F.cross_entropy((hidden_states @ weight.T).float(), targets)`, an fp32 scalar, without the whole logits.

    Under autocast the products run in its dtype; the weight's gradient is summed over chunks in fp32. Inside
    `torch.compile` the plain expression is computed instead, which the compiler fuses by itself.

    Arguments:
        hidden_states: (..., n_embd).
        weight: (vocab_size, n_embd).
        targets: (...) token ids that the hidden states should predict, already shifted.
        ignore_index: targets of this value count for nothing.
        reduction: "mean" over the targets that count (NaN when none does, like `F.cross_entropy`), or "sum".

    Raises:
        ValueError: for another reduction, or targets whose shape does not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', found {reduction!r}; choose one of the two")
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"expected targets of shape {tuple(hidden_states.shape[:-1])}, found {tuple(targets.shape)}; "
            "give one target per hidden state"
        )
    hidden_states, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    if torch.compiler.is_compiling() or hidden_states.device.type == "meta":
        logits = F.linear(hidden_states, weight).float()
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, weight)]
    total = _SummedCrossEntropy.apply(hidden_states, weight, targets, ignore_index, *wanted)
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    # A plain 0 / 0 would be NaN in the gradients too, where `F.cross_entropy` gives zeros.
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("nan"))


class _SummedCrossEntropy(torch.autograd.Function):
    """The summed loss; its gradients are complete when the forward pass is, but for the factor from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        hidden_wanted: bool,
        weight_wanted: bool,
    ) -> Tensor:
        device = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
        ctx.dtypes = hidden_states.dtype, weight.dtype
        with torch.autocast(device, enabled=False):
            loss, *gradients = _loss_and_gradients(
                hidden_states.to(dtype), weight.to(dtype), targets, ignore_index, hidden_wanted, weight_wanted
            )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # In fp32 or better, and rounded once: the factor, 1 / count for a mean, is seldom a number of bf16.
            precise = torch.promote_types(dtype, torch.float32)
            scaled.append(None if gradient is None else (gradient.to(precise) * upstream).to(dtype))
        return (*scaled, None, None, None, None)


def _loss_and_gradients(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, hidden_wanted: bool, weight_wanted: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the summed loss and its gradients to hidden states and weight (fp32), None where not wanted.

    A frozen head, as under LoRA, thereby costs two matrix products instead of three.
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
    hidden_gradient = torch.empty_like(hidden_states) if hidden_wanted else None
    weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if weight_wanted else None
    product = torch.empty_like(weight) if weight_wanted else None

    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        logits = logits_buffer[: part.stop - start]
        torch.mm(hidden_states[part], weight.t(), out=logits)
        for first in range(start, part.stop, rows):
            here = slice(first, min(first + rows, part.stop))
            block = logits[first - start : here.stop - start]
            probabilities = softmax_buffer[: len(block)]
            probabilities.copy_(block)
            target_logits = probabilities.gather(1, targets[here])
            maximum = probabilities.amax(1, keepdim=True)
            torch.softmax(probabilities, 1, out=probabilities)
            # The largest probability is exp(0) / sum, so the sum of exponentials is known without another exp.
            torch.sub(maximum - target_logits, probabilities.amax(1, keepdim=True).log_(), out=losses[here])
            if hidden_wanted or weight_wanted:
                # d loss / d logits = probabilities - one_hot(target)
                probabilities.scatter_add_(1, targets[here], torch.full_like(target_logits, -1.0))
                probabilities.mul_(counted[here])
                block.copy_(probabilities)
        if hidden_gradient is not None:
            torch.mm(logits, weight, out=hidden_gradient[part])
        if weight_gradient is not None:
            weight_gradient.add_(torch.mm(logits.t(), hidden_states[part], out=product))

    loss = losses.masked_fill_(~counted, 0.0).sum()
    return loss, hidden_gradient, weight_gradient
