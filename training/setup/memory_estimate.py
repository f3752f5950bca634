"""Memory that training is expected to take on one device: counted, not measured.

Weights, gradients and AdamW's two moments are fp32. Activations are what a block keeps for its backward pass; the count
follows Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4.1) with what
is different here: the residual stream stays fp32 under autocast. A compiler fuses some of them away. What the allocator
and the libraries hold comes on top: a gigabyte or so on a GPU.
"""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from training.recipe import Recipe

_FLOAT = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations


def expected_memory(
    config: PreTrainedConfig,
    recipe: Recipe,
    *,
    sequences: int,
    num_processes: int = 1,
    sharded: bool = False,
    bf16: bool = False,
    device_type: str = "cpu",
) -> MemoryEstimate:
    """What a training step takes on one device.

    Arguments:
        config: the model's.
        recipe: its knobs of memory.
        sequences: in one forward pass.
        num_processes: that share the weights when `sharded`, and exchange gradients when not.
        sharded: under FSDP2.
        bf16: whether products are taken in bf16.
        device_type: "cpu" keeps attention's scores when some are dropped.
    """
    size = 2 if bf16 else _FLOAT
    tokens, n_embd, vocab_size = sequences * recipe.seq_len, config.n_embd, config.vocab_size
    parameters = expected_parameters(config)
    held = parameters * _FLOAT // (num_processes if sharded else 1)
    # DDP copies gradients into buckets to send them; a sharded model gathers its largest unit, the embeddings.
    in_transit = 0
    if num_processes > 1:
        in_transit = vocab_size * n_embd * (size + _FLOAT) if sharded else parameters * _FLOAT
    eager = recipe.attn_implementation == "eager" or (recipe.dropout > 0 and device_type == "cpu")
    block = expected_activations(
        tokens,
        n_embd,
        size=size,
        attention_scores=config.n_head * recipe.seq_len if eager else 0,
        dropout=recipe.dropout > 0,
    )
    if recipe.activation_checkpointing:
        blocks = config.n_layer * tokens * n_embd * _FLOAT + block
    else:
        blocks = config.n_layer * block
    copies = parameters * size if bf16 and not sharded else 0  # autocast keeps each weight's for the backward pass
    # The loss keeps the gradient of the head; compiled, it forms the logits of all tokens at once.
    whole_logits = recipe.compile and not sharded
    head = tokens * vocab_size * (size + _FLOAT) if whole_logits else vocab_size * n_embd * _FLOAT
    return MemoryEstimate(
        weights=held,
        gradients=held + in_transit,
        optimizer=2 * held,
        activations=blocks + copies + head + tokens * n_embd * (_FLOAT + 2 * size),
    )


def expected_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a model with this configuration: GPT-2's, with its head tied."""
    n_embd = config.n_embd
    n_inner = 4 * n_embd if config.n_inner is None else config.n_inner
    attention = 4 * n_embd * n_embd + 4 * n_embd
    mlp = 2 * n_embd * n_inner + n_inner + n_embd
    return (
        (config.vocab_size + config.n_positions) * n_embd + config.n_layer * (attention + mlp + 4 * n_embd) + 2 * n_embd
    )


def expected_activations(
    tokens: int, n_embd: int, *, size: int, attention_scores: int = 0, dropout: bool = False
) -> int:
    """Bytes that one block keeps of `tokens` tokens for its backward pass, with products of `size` bytes a number.

    The stream before each of the two norms in fp32; in the products' dtype the norms' outputs (2), query, key and value
    (3), what attention gives (1), the MLP before and behind its activation (4 + 4). `attention_scores` is the number of
    scores of a token over all heads, kept once before and once behind the softmax's rounding.
    """
    numbers = 14 * n_embd
    stream = 2 * n_embd * _FLOAT
    scores = attention_scores * (_FLOAT + size if size < _FLOAT else _FLOAT)
    masks = (2 * n_embd + attention_scores) * (1 + size) if dropout else 0
    return tokens * (numbers * size + stream + scores + masks)


def available_memory(device: torch.device, processes_here: int = 1) -> int | None:
    """Bytes that this process may still take on its device: a CPU's free memory is shared by the processes on it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // processes_here
    return None
