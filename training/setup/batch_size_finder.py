"""The largest number of sequences per forward pass that fits into memory, found by trying.

Only divisors of a step's batch are tried, so tokens_per_step and the samples of each step do not depend on the result.
Each rank tries without communication, since a rank that runs out of memory would leave the others waiting; then all
take the minimum.

A CPU process that runs out of memory is killed, so there the number is limited by the memory estimate and by the tokens
that keep the cores busy.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.cli_errors import InputError
from training.recipe import Recipe
from training.setup.accelerator import all_reduce_min
from training.setup.memory_estimate import available_memory, estimate_memory
from training.setup.model import compiles
from training.step.batch_plan import BatchPlan
from training.step.train_step import model_inputs

_CPU_TOKENS = 8192  # per forward pass; more are not faster, since the loss takes 1,024 at a time


def find_batch_size(plan: BatchPlan, accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe) -> BatchPlan:
    """The plan with the largest `per_device` that fits on every rank.

    Weights and random state do not change; the model moves to the device. Under FSDP2 the unsharded model is tried, so
    the result is smaller than what would fit.

    Raises:
        InputError: a single sequence does not fit.
    """
    sizes = divisors(plan.sequences_per_step // plan.num_processes)
    limit = _cpu_limit(model, recipe, plan) if accelerator.device.type == "cpu" else sizes[-1]
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


def _cpu_limit(model: PreTrainedModel, recipe: Recipe, plan: BatchPlan) -> int:
    """The most sequences per forward pass whose estimate fits into half of a CPU's free memory."""
    memory = available_memory(torch.device("cpu"), plan.num_processes)
    sequences = max(1, _CPU_TOKENS // recipe.seq_len)
    while sequences > 1 and memory is not None:
        if estimate_memory(model, recipe, sequences=sequences).total <= memory // 2:
            break
        sequences -= 1
    return sequences
