"""Causal attention in blocks of queries, for training in bf16 on CPUs.

A block of queries attends only to the keys up to its end, in one product for all heads. On a CPU, `sdpa` makes many
small products, and its forward and backward pass take twice as long for 256 or 512 tokens (docs/benchmarks.md). The
price is memory and rounding: the weights are kept for the backward pass. Scores, and sums over blocks in the backward
pass, are rounded to bf16; eager attention rounds its scores too.

Under torch.compile, every sequence length is a graph of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "blockwise"
_QUERIES = 128  # of a block; the fastest for sequences of 256 to 1,024 tokens


def blockwise_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output, (batch, seq, n_head, head_dim), and no weights.

    Falls back to `sdpa` for other dtypes than bf16, a mask, dropout, cached keys, attention that is not causal, and
    further arguments.

    Args:
        module: the attention layer.
        query: (batch, n_head, seq, head_dim).
        key: (batch, n_head, key_seq, head_dim).
        value: (batch, n_head, key_seq, head_dim).
        attention_mask: as for `sdpa`; None for causal attention.
        dropout: dropout probability of the weights.
        scaling: factor of the scores; default: 1 / sqrt(head_dim).
        is_causal: no attention to later tokens; default: the attribute of the module.
        kwargs: further arguments of `sdpa`.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    others = [argument for argument in (attention_mask, *kwargs.values()) if argument is not None]
    if others or dropout or not causal or query.dtype != torch.bfloat16 or query.shape != key.shape:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Autocast would convert to fp32 for the softmax, which sums in fp32 anyway.
    with torch.autocast(query.device.type, enabled=False):
        heads = (part.reshape(-1, *part.shape[2:]) for part in (query * scaling, key, value))
        attended: Tensor = _CausalAttention.apply(*heads)
    return attended.view(query.shape).transpose(1, 2), None


class _CausalAttention(torch.autograd.Function):
    """Attention of scaled queries (heads, seq, head_dim) to keys and values of the same shape."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended, weights = torch.empty_like(query), []
        future = query.new_full((_QUERIES, _QUERIES), -torch.inf).triu(1)
        for start, end in _blocks(query.shape[1]):
            scores = torch.bmm(query[:, start:end], key[:, :end].mT)  # (heads, end - start, end)
            scores[:, :, start:] += future[: end - start, : end - start]
            weights.append(torch.softmax(scores, dim=-1))
            attended[:, start:end] = torch.bmm(weights[-1], value[:, :end])
        ctx.save_for_backward(query, key, value, *weights)
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *weights = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for (start, end), block_weights in zip(_blocks(query.shape[1]), weights, strict=True):
            block_gradient = gradient[:, start:end]
            of_value[:, :end].baddbmm_(block_weights.mT, block_gradient)
            of_weights = torch.bmm(block_gradient, value[:, :end].mT)
            of_scores = torch._softmax_backward_data(of_weights, block_weights, -1, query.dtype)
            of_query[:, start:end] = torch.bmm(of_scores, key[:, :end])
            of_key[:, :end].baddbmm_(of_scores.mT, query[:, start:end])
        return of_query, of_key, of_value


def kept_weights(seq: int) -> float:
    """Return the mean number of attention weights per query that are kept for the backward pass."""
    return sum((end - start) * end for start, end in _blocks(seq)) / seq


def _blocks(seq: int) -> list[tuple[int, int]]:
    """Return where blocks of queries start and end."""
    return [(start, min(start + _QUERIES, seq)) for start in range(0, seq, _QUERIES)]


AttentionInterface.register(NAME, blockwise_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
