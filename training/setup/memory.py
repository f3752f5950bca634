"""The memory that training needs on one device, estimated, and the batch that fits into it, found by trying.

The estimate covers weights, gradients, AdamW's two moments and Muon's momentum, all in fp32, and activations. What a
block saves for its backward pass follows Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large
Transformer Models", section 4.1), except that the residual stream stays fp32 under autocast. The estimate omits what
torch.compile saves, and the gigabyte or so that allocator and libraries take on a GPU.

Only divisors of a step's batch are tried as batch sizes, so tokens_per_step and the samples of each step do not depend
on the result. Each rank tries without communication, since a rank that runs out of memory would leave the others
waiting; then all take the minimum. A CPU process that runs out of memory is killed, so there the number is limited by
the estimate and by the tokens that keep the cores busy.
"""

import os
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.cli_errors import InputError
from gpt2_scratch.blockwise_attention import kept_weights
from training.recipe import Recipe
from training.setup.accelerator import all_reduce_min
from training.setup.model import compiles
from training.step.batch_plan import BatchPlan
from training.step.precision import autocast_dtype
from training.step.train_step import model_inputs

_FLOAT = 4  # bytes
_CPU_TOKENS = 8192  # per forward pass; more are not faster, since the loss takes 1,024 at a time


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
    otherwise. On "cpu", attention with dropout saves its scores, and blockwise attention its weights.
    """
    config, size = model.config, dtype.itemsize
    tokens, n_embd, vocab_size = sequences * recipe.seq_len, config.n_embd, config.vocab_size
    parameters, shares = model.num_parameters(), num_processes if sharded else 1
    held = parameters * _FLOAT // shares
    matrices = sum(parameter.numel() for parameter in model.base_model.h.parameters() if parameter.dim() == 2)
    one_moment_only = matrices * _FLOAT // shares if recipe.optimizer == "muon" else 0
    # In its first step, DDP copies gradients into buckets; FSDP2 gathers its largest unit, the embeddings.
    in_transit = 0
    if num_processes > 1:
        in_transit = vocab_size * n_embd * (size + _FLOAT) if sharded else parameters * _FLOAT
    saves_scores = recipe.attn_implementation == "eager" or (recipe.dropout > 0 and device_type == "cpu")
    # Not from `attention_for`, which refuses what this machine cannot train: a forecast is of others.
    blockwise = recipe.attn_implementation == "sdpa" and device_type == "cpu" and dtype == torch.bfloat16
    saves_weights = blockwise and not recipe.dropout and not recipe.document_mask
    block = block_activations(
        tokens,
        n_embd,
        size=size,
        attention_scores=config.n_head * recipe.seq_len if saves_scores else 0,
        attention_weights=config.n_head * kept_weights(recipe.seq_len) if saves_weights else 0,
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


def block_activations(
    tokens: int,
    n_embd: int,
    *,
    size: int,
    attention_scores: int = 0,
    attention_weights: float = 0,
    dropout: bool = False,
) -> int:
    """Bytes that one block saves of `tokens` tokens for its backward pass.

    Per token and channel: the residual stream before both norms in fp32 (2); in the products' dtype of `size` bytes the
    outputs of the norms (2), query, key and value (3), the output of attention (1), the input and output of the MLP's
    activation (4 + 4). `attention_scores` is the number of scores per token over all heads, saved before and after the
    softmax; `attention_weights` is the number of weights per token that are saved after the softmax only.
    """
    stream = 2 * n_embd * _FLOAT
    scores = attention_scores * (_FLOAT + size if size < _FLOAT else _FLOAT)
    masks = (2 * n_embd + attention_scores) * (1 + size) if dropout else 0
    return int(tokens * ((14 * n_embd + attention_weights) * size + stream + scores + masks))


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


def find_batch_size(plan: BatchPlan, accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe) -> BatchPlan:
    """The plan with the largest `per_device` that fits on every rank.

    Weights and random state do not change; the model moves to the device. Under FSDP2 the unsharded model is tried, so
    the result is smaller than what would fit.

    Raises:
        InputError: a single sequence does not fit.
    """
    sizes = divisors(plan.sequences_per_step // plan.num_processes)
    limit = (
        _cpu_limit(model, recipe, plan, autocast_dtype(accelerator)) if accelerator.device.type == "cpu" else sizes[-1]
    )
    largest = _largest([size for size in sizes if size <= limit], accelerator, model, recipe)
    per_device = all_reduce_min(accelerator, largest)
    if not per_device:
        raise InputError(
            f"a single sequence of seq_len={recipe.seq_len:,} does not fit into the memory of {accelerator.device}; "
            "train a smaller model, use a shorter seq_len, or set activation_checkpointing"
        )
    return replace(plan, per_device=per_device)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _largest(sizes: list[int], accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe) -> int:
    """The largest of `sizes` (ascending) that fits on this device, or 0."""
    model.to(accelerator.device)
    # FSDP2 compiles block by block instead, which takes a little less memory than the uncompiled model here.
    compiled = compiles(recipe, accelerator.device.type) and not accelerator.is_fsdp2
    module: nn.Module = torch.compile(model, dynamic=False) if compiled else model  # type: ignore[assignment]
    was_training = model.training
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        try:
            for size in reversed(sizes):
                try:
                    _try_step(module, accelerator, recipe, size)
                except Exception as error:
                    if not should_reduce_batch_size(error):  # out of memory, on any device
                        raise
                else:
                    return size
                finally:
                    model.zero_grad(set_to_none=True)
                clear_device_cache(garbage_collection=True)
            return 0
        finally:
            model.train(was_training)
            if compiled:
                torch.compiler.reset()


def _try_step(model: nn.Module, accelerator: Accelerator, recipe: Recipe, batch_size: int) -> None:
    """Use a step's peak memory: a second micro-step on top of gradients, optimizer moments and DDP's buckets."""
    copies = 2 + (accelerator.num_processes > 1)
    held: list[Tensor] = [torch.empty_like(weight) for weight in model.parameters() for _ in range(copies)]
    ids = torch.ones(batch_size, recipe.seq_len, dtype=torch.int64)
    inputs = model_inputs((ids, ids), accelerator.device, 0 if recipe.document_mask else None)
    model.train()
    for _ in range(2):
        with accelerator.autocast():
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    del held


def _cpu_limit(model: PreTrainedModel, recipe: Recipe, plan: BatchPlan, dtype: torch.dtype) -> int:
    """The most sequences per forward pass whose estimate fits into half of a CPU's free memory."""
    memory = available_memory(torch.device("cpu"), plan.num_processes)
    sequences = max(1, _CPU_TOKENS // recipe.seq_len)
    while sequences > 1 and memory is not None:
        if estimate_memory(model, recipe, sequences=sequences, dtype=dtype).total <= memory // 2:
            break
        sequences -= 1
    return sequences
