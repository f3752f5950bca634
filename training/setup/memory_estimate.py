"""An estimate of the memory that training needs on one device, without running it.

Weights, gradients, AdamW's two moments and Muon's momentum are fp32. The activations that a block saves for its
backward pass follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section
4.1), except that the residual stream stays fp32 under autocast. Not included: what torch.compile saves, and the
gigabyte or so that allocator and libraries take on a GPU.
"""

import os
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from training.recipe import Recipe

_FLOAT = 4  # bytes


class MemoryEstimate(NamedTuple):
    """Bytes on one device, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self)

    def __str__(self) -> str:
        return ", ".join(f"{part} {gib(count)}" for part, count in self._asdict().items())


def estimate_memory(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    sequences: int,
    num_processes: int = 1,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
) -> MemoryEstimate:
    """The memory of a training step with `sequences` per forward pass on one device.

    `dtype` is that of matrix products. The processes share the weights if `sharded` (FSDP2), and exchange gradients
    otherwise. On "cpu", attention with dropout saves its scores.
    """
    config, size = model.config, dtype.itemsize
    tokens, n_embd, vocab_size = sequences * recipe.seq_len, config.n_embd, config.vocab_size
    parameters, shares = model.num_parameters(), num_processes if sharded else 1
    held = parameters * _FLOAT // shares
    matrices = sum(parameter.numel() for parameter in model.base_model.h.parameters() if parameter.dim() == 2)
    one_moment_only = matrices * _FLOAT // shares if recipe.optimizer == "muon" else 0
    # DDP copies gradients into buckets; FSDP2 gathers its largest unit, the embeddings.
    in_transit = 0
    if num_processes > 1:
        in_transit = vocab_size * n_embd * (size + _FLOAT) if sharded else parameters * _FLOAT
    saves_scores = recipe.attn_implementation == "eager" or (recipe.dropout > 0 and device_type == "cpu")
    block = block_activations(
        tokens,
        n_embd,
        size=size,
        attention_scores=config.n_head * recipe.seq_len if saves_scores else 0,
        dropout=recipe.dropout > 0,
    )
    blocks = config.n_layer * block
    if recipe.activation_checkpointing:
        blocks = config.n_layer * tokens * n_embd * _FLOAT + block
    autocast_copies = parameters * size if size < _FLOAT and not sharded else 0  # of the weights, for the backward pass
    head = vocab_size * n_embd * _FLOAT  # the chunked loss holds the gradient of the head
    return MemoryEstimate(
        weights=held,
        gradients=held + in_transit,
        optimizer=2 * held - one_moment_only,
        activations=blocks + autocast_copies + head + tokens * n_embd * (_FLOAT + 2 * size),
    )


def block_activations(tokens: int, n_embd: int, *, size: int, attention_scores: int = 0, dropout: bool = False) -> int:
    """Bytes that one block saves of `tokens` tokens for its backward pass.

    Per token and channel: the residual stream before both norms in fp32 (2); in the products' dtype of `size` bytes the
    outputs of the norms (2), query, key and value (3), the output of attention (1), the input and output of the MLP's
    activation (4 + 4). `attention_scores` is the number of scores per token over all heads, saved before and after the
    softmax.
    """
    stream = 2 * n_embd * _FLOAT
    scores = attention_scores * (_FLOAT + size if size < _FLOAT else _FLOAT)
    masks = (2 * n_embd + attention_scores) * (1 + size) if dropout else 0
    return tokens * (14 * n_embd * size + stream + scores + masks)


def gib(count: int) -> str:
    """Bytes as GiB, or MiB if they are few."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:.1f} MiB"


def available_memory(device: torch.device, processes_here: int = 1) -> int | None:
    """Free bytes for this process on its device; the processes of a CPU share its memory. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes_here
    return None
