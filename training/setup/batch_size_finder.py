"""How many sequences one forward pass can take: the largest number that fits into the device's memory, by trying.

Only numbers that divide a step are tried, the largest first, so tokens_per_step stays what the recipe says and a run
sees the same samples whatever is found. Each process tries by itself, without exchanging anything, because one that
runs out of memory would leave the others waiting; then all take the smallest that any found.

A CPU has no such error: the kernel ends a process that takes too much. There the number is bounded by what is expected
to fit into half of the free memory, and by tokens that keep its cores busy; more would not be faster.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.cli_errors import InputError
from training.recipe import Recipe
from training.setup.build import least_of_all
from training.setup.memory_estimate import available_memory, expected_memory
from training.step.batch_plan import BatchPlan
from training.step.train_step import model_inputs

_CPU_TOKENS = 8192  # in one forward pass; the loss takes 1,024 at a time


def fitted(
    plan: BatchPlan, accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe, end_of_text_id: int | None = None
) -> BatchPlan:
    """The plan with the largest `per_device` that divides its step and fits, the same on all processes.

    Weights and random state are left as they were; the model moves to the device. Under FSDP2 the whole weights are
    tried, before they are sharded, so what is found errs to the small side.

    Raises:
        InputError: not even one sequence fits.
    """
    sizes = divisors(plan.sequences_per_step // plan.num_processes)
    bound = _cpu_bound(model, recipe, plan) if accelerator.device.type == "cpu" else sizes[-1]
    found = _largest([size for size in sizes if size <= max(1, bound)], accelerator, model, recipe, end_of_text_id)
    smallest = least_of_all(accelerator, found)
    if not smallest:
        raise InputError(
            f"not even one sequence of seq_len={recipe.seq_len:,} fits into the memory of {accelerator.device}; "
            "train a smaller model, shorter windows, or with activation_checkpointing"
        )
    return BatchPlan(plan.seq_len, plan.sequences_per_step, smallest, plan.num_processes)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, smallest first."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _largest(
    sizes: list[int], accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe, end_of_text_id: int | None
) -> int:
    """The largest of `sizes` (ascending) that this device can take, or 0."""
    model.to(accelerator.device)
    # Each size is a graph of its own, as it will be in training; blocks of a sharded model are compiled one by one, and
    # take a little less than uncompiled ones do here.
    compiled = recipe.compile and not accelerator.is_fsdp2
    tried: nn.Module = torch.compile(model, dynamic=False) if compiled else model  # type: ignore[assignment]
    left = list(sizes)

    def smaller() -> int:
        left.pop()
        return left[-1] if left else 0

    @find_executable_batch_size(starting_batch_size=left[-1], reduce_batch_size_fn=smaller)
    def attempt(batch_size: int) -> int:
        try:
            _try_step(tried, accelerator, recipe, batch_size, end_of_text_id)
        finally:
            model.zero_grad(set_to_none=True)
        return batch_size

    was_training = model.training
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            return attempt()
        except RuntimeError:
            if left:
                raise
            return 0  # the helper's own error, when it has come to 0
        finally:
            model.train(was_training)
            if compiled:
                torch.compiler.reset()


def _try_step(
    model: nn.Module, accelerator: Accelerator, recipe: Recipe, batch_size: int, end_of_text_id: int | None
) -> None:
    """Take what a step takes at its worst: a second pass beside the first's gradients and the optimizer's moments."""
    copies = 2 + (accelerator.num_processes > 1)  # DDP's buckets
    taken: list[Tensor] = [torch.empty_like(weight) for weight in model.parameters() for _ in range(copies)]
    ids = torch.zeros(batch_size, recipe.seq_len, dtype=torch.int64)
    model.train()
    for _ in range(2):
        with accelerator.autocast():
            loss = model(**model_inputs((ids, ids), accelerator.device, end_of_text_id), use_cache=False).loss
        loss.backward()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    del taken


def _cpu_bound(model: PreTrainedModel, recipe: Recipe, plan: BatchPlan) -> int:
    """Sequences in one forward pass that a CPU should be asked for at most."""
    memory = available_memory(torch.device("cpu"), plan.num_processes)
    most = max(1, _CPU_TOKENS // recipe.seq_len)
    while most > 1 and memory is not None:
        if expected_memory(model.config, recipe, sequences=most).total <= memory // 2:
            break
        most -= 1
    return most
