"""Language-modeling head and cross entropy, computed in chunks that never hold the logits of all tokens.

The logits are by far the largest tensor of a language model: in fp32, 0.8 GB for 4,096 tokens and a vocabulary of
50,257. Here the forward pass computes each chunk's loss, summed in fp32, and the gradients of hidden states and weight.
The backward pass only scales them. This keeps the three matrix products and saves most memory traffic.

It is a custom operator, so a compiled model calls it as it is, without a break in its graph. Gradients in the forward
pass are an idea of Liger-Kernel (Hsu et al. 2024); not storing logits is one of "Cut Your Losses in Large-Vocabulary
Language Models" (Wijmans et al. 2024).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton  # also: is the GPU new enough

try:
    import triton
    import triton.language as tl
except ImportError:  # on most machines without a GPU
    triton = None

# On CPUs; the fastest values measured for vocabularies of 4,096 and 50,257: smaller chunks add up the weight's
# gradient more often, larger ones cause more page faults.
_CHUNK_TOKENS = 1024
# Logits held in fp32 on CPUs. Fewer would fit a CPU's cache and gain 5 % on idle cores, but lose far more on shared
# cores, where threads wait for each other at every small step.
_SOFTMAX_LOGITS = 2**22
# On GPUs: at most 1 GB in bf16. The fewer chunks, the less often the weight's gradient is added up: on an H100 the head
# of GPT-2 takes 18.5 ms for 32,768 tokens, 19.0 with half as many logits and 21.2 with a quarter. The vocabulary is
# padded to a multiple of 64, because GPUs multiply odd sizes slowly.
_GPU_CHUNK_LOGITS = 2**29
_GPU_COLUMNS = 64
_FP16_HEADROOM = 16


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return `F.cross_entropy((hidden_states @ weight.T).float(), targets)`, an fp32 scalar, with less memory.

    Under autocast the products run in its dtype; the weight's gradient is summed over chunks in fp32.

    Args:
        hidden_states: (..., n_embd).
        weight: (vocab_size, n_embd).
        targets: (...) token ids, already shifted.
        ignore_index: targets of this value are ignored.
        reduction: "sum", or "mean" over the targets that are not ignored (NaN if there are none).
        label_smoothing: as in `F.cross_entropy`.
        z_loss: factor of the squared logarithm of the softmax's denominator, which is added to the loss (PaLM paper,
            section 5).

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
    device = hidden_states.device.type
    # The meta device has no autocast.
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
    needs_gradient = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, weight)]
    total, _, _ = _summed_loss(
        hidden_states, weight, targets, dtype, ignore_index, label_smoothing, z_loss, *needs_gradient
    )
    if reduction == "sum":
        return total
    count = (targets != ignore_index).sum()
    # 0 / 0 would make the gradients NaN too, but those of `F.cross_entropy` are zero.
    return (total / count.clamp(min=1)).masked_fill(count == 0, float("nan"))


# The code of a folder from the Hub is another module, with an operator of its own.
@torch.library.custom_op(f"{__name__.replace('.', '_')}::summed_loss", mutates_args=())
def _summed_loss(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed loss and its gradients for hidden states (in `dtype`) and weight (fp32), empty if not needed.

    A frozen head, as in LoRA, costs two matrix products instead of three.
    """
    tokens, vocab_size, device = len(hidden_states), len(weight), hidden_states.device
    chunk, columns = _chunk_shape(vocab_size, device.type)
    chunk = max(1, min(tokens, chunk))
    softmax = _softmax_by_row if device.type == "cuda" and has_triton() else _softmax_in_blocks

    hidden_states, weight = hidden_states.to(dtype), _padded(weight, columns, dtype)
    counted = (targets != ignore_index).unsqueeze(1)
    targets = targets.unsqueeze(1).masked_fill(~counted, 0)
    losses = torch.empty(tokens, 1, dtype=torch.float32, device=device)
    buffer = hidden_states.new_empty(chunk, columns)
    hidden_gradient, weight_gradient = _empty_gradients(hidden_states, weight, dtype, needs_hidden, needs_weight)
    weight_gradient.zero_()
    # In bf16 and fp16 a chunk's part of the weight's gradient is a product of its own, summed in fp32.
    product = torch.empty_like(weight) if needs_weight and dtype != torch.float32 else None
    # The weight's gradient of a chunk sums over its tokens, and could overflow in fp16.
    headroom = _FP16_HEADROOM if dtype == torch.float16 else 1

    with torch.autocast(device.type, enabled=False):
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            logits = buffer[: part.stop - start]
            torch.mm(hidden_states[part], weight.t(), out=logits)
            losses[part] = softmax(logits, targets[part], counted[part], vocab_size, label_smoothing, z_loss)
            if needs_hidden:
                torch.mm(logits, weight, out=hidden_gradient[part])
            if product is not None:
                inputs = hidden_states[part] / headroom if headroom > 1 else hidden_states[part]
                weight_gradient.add_(torch.mm(logits.t(), inputs, out=product), alpha=headroom)
            elif needs_weight:
                torch.addmm(weight_gradient, logits.t(), hidden_states[part], out=weight_gradient)
    return losses.sum(), hidden_gradient, weight_gradient[:vocab_size]


def _padded(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`, with rows of zeros below."""
    if rows == len(weight):
        return weight.to(dtype)
    padded = weight.new_zeros(rows, weight.shape[1], dtype=dtype)
    padded[: len(weight)] = weight
    return padded


def _chunk_shape(vocab_size: int, device_type: str) -> tuple[int, int]:
    """Return the tokens and the columns of a chunk of logits."""
    if device_type == "cpu":
        return _CHUNK_TOKENS, vocab_size
    columns = _GPU_COLUMNS * math.ceil(vocab_size / _GPU_COLUMNS)
    return max(1024, _GPU_CHUNK_LOGITS // columns // 1024 * 1024), columns


def _empty_gradients(
    hidden_states: Tensor, weight: Tensor, dtype: torch.dtype, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden_states, dtype=dtype) if needs_hidden else hidden_states.new_empty(0, dtype=dtype),
        torch.empty_like(weight, dtype=torch.float32) if needs_weight else weight.new_empty(0, dtype=torch.float32),
    )


@_summed_loss.register_fake
def _(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(hidden_states, weight, dtype, *settings[-2:])
    return hidden_states.new_empty((), dtype=torch.float32), *gradients


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.dtypes, ctx.needed = (inputs[0].dtype, inputs[1].dtype), inputs[-2:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@torch.autograd.function.once_differentiable
def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    scaled: list[Tensor | None] = []
    for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needed, strict=True):
        # Scaled in fp32 and rounded once, because bf16 cannot hold most factors, such as 1 / count for a mean.
        precise = torch.promote_types(dtype, torch.float32)
        use = needed and upstream is not None
        scaled.append((gradient.to(precise) * upstream).to(dtype) if use else None)
    return (*scaled, *(None,) * 7)


_summed_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _softmax_in_blocks(
    logits: Tensor, targets: Tensor, counted: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Return the losses (tokens, 1), and replace the logits by their gradient; few at a time are converted to fp32."""
    logits[:, vocab_size:] = -torch.inf
    losses = torch.empty_like(targets, dtype=torch.float32)
    rows = max(1, _SOFTMAX_LOGITS // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, min(start + rows, len(logits)))
        probabilities = logits[part].float()  # the logits themselves if they are fp32
        target_logits = probabilities.gather(1, targets[part])
        maximum = probabilities.amax(1, keepdim=True)
        mean = probabilities[:, :vocab_size].mean(1, keepdim=True) if label_smoothing else None
        torch.softmax(probabilities, 1, out=probabilities)
        # The largest probability is exp(0) / sum, which gives the sum without another exp.
        log_of_largest = probabilities.amax(1, keepdim=True).log_()
        torch.sub(maximum - target_logits, log_of_largest, out=losses[part])
        # d loss / d logits = probabilities - one_hot(target)
        if z_loss:
            log_of_sum = maximum - log_of_largest
            losses[part] += z_loss * log_of_sum.square()
            probabilities.mul_(1 + 2 * z_loss * log_of_sum)
        probabilities.scatter_add_(1, targets[part], torch.full_like(target_logits, label_smoothing - 1.0))
        if mean is not None:
            losses[part] += label_smoothing * (target_logits - mean)
            probabilities[:, :vocab_size] -= label_smoothing / vocab_size
        probabilities.mul_(counted[part])
        if probabilities.dtype != logits.dtype:
            logits[part] = probabilities
    return losses.masked_fill_(~counted, 0.0)


def _softmax_by_row(
    logits: Tensor, targets: Tensor, counted: Tensor, vocab_size: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Do the same as `_softmax_in_blocks` in one kernel, which takes two thirds of the time of a compiled function."""
    losses = torch.empty_like(targets, dtype=torch.float32)
    block = min(_ROW_BLOCK, triton.next_power_of_2(logits.shape[1]))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _softmax_kernel[(len(logits),)](
            logits,
            targets,
            counted,
            losses,
            logits.shape[1],
            vocab_size,
            label_smoothing,
            z_loss,
            block=block,
            num_warps=max(4, block // 1024),
        )
    return losses


# The fastest of six on an H100.
_ROW_BLOCK = 16_384

if triton is not None:
    # Triton accepts no annotations but its own.
    @triton.jit
    def _softmax_kernel(  # type: ignore[no-untyped-def]
        logits, targets, counted, losses, columns, vocab_size, label_smoothing, z_loss, block: tl.constexpr
    ):
        """Compute the loss of a row of logits, and replace the row by its gradient.

        The first loop reads the row for the logarithm of the softmax's denominator (Milakov and Gimelshein 2018). The
        second finds most of it in the cache.
        """
        row = tl.program_id(0).to(tl.int64)
        logits += row * columns
        target, is_counted = tl.load(targets + row), tl.load(counted + row)
        maximum, denominator, total = -float("inf"), 0.0, 0.0
        for start in range(0, vocab_size, block):
            column = start + tl.arange(0, block)
            in_vocabulary = column < vocab_size
            values = tl.load(logits + column, mask=in_vocabulary, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(maximum, tl.max(values))
            denominator = denominator * tl.exp(maximum - larger) + tl.sum(tl.exp(values - larger))
            maximum = larger
            total += tl.sum(tl.where(in_vocabulary, values, 0.0))
        log_of_sum = maximum + tl.log(denominator)
        target_logit = tl.load(logits + target).to(tl.float32)
        tl.debug_barrier()  # every thread has read the target's logit before it is replaced
        loss = log_of_sum - target_logit + z_loss * log_of_sum * log_of_sum
        loss += label_smoothing * (target_logit - total / vocab_size)
        tl.store(losses + row, tl.where(is_counted, loss, 0.0))
        for start in range(0, columns, block):
            column = start + tl.arange(0, block)
            in_vocabulary = column < vocab_size
            values = tl.load(logits + column, mask=in_vocabulary, other=-float("inf")).to(tl.float32)
            # d loss / d logits = probabilities - one_hot(target)
            gradient = tl.exp(values - log_of_sum) * (1 + 2 * z_loss * log_of_sum)
            gradient -= tl.where(column == target, 1 - label_smoothing, 0.0)
            gradient -= tl.where(in_vocabulary, label_smoothing / vocab_size, 0.0)
            gradient = tl.where(is_counted, gradient, 0.0)
            tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < columns)
