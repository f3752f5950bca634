"""`--preflight --gpu a100 --gpus 8`: the memory, time and cost of a run on GPUs that are not there.

Nothing is measured: the speed follows from the operations of a token, the GPU's peak and an assumed MFU. No data and no
weights are needed.
"""

from pathlib import Path
from typing import Any

import torch

from common.cli_errors import InputError, did_you_mean
from gpt2_scratch import GPT2ScratchForCausalLM
from training.data.loading.order import Order
from training.data.shards.shard_reader import ShardFolder
from training.monitoring.throughput import PEAKS, flops_per_token
from training.recipe import Recipe
from training.setup.memory import MemoryEstimate, divisors, estimate_memory, gib
from training.setup.model import config_without_weights
from training.setup.preflight import known_vocabulary, report_length, report_size, report_time
from training.step.batch_plan import BatchPlan, plan_batch
from training.step.precision import DTYPES

_USABLE = 0.9  # of the memory: the rest is for libraries, the allocator and what torch.compile saves

# Name -> its name in the table of peaks, and GiB of memory.
GPUS = {
    "a100": ("A100", 80),
    "a100-40gb": ("A100", 40),
    "h100": ("H100", 80),
    "h200": ("H200", 141),
    "b200": ("B200", 180),
    "l40s": ("L40S", 48),
    "l4": ("L4", 24),
    "a10g": ("A10G", 24),
    "rtx4090": ("RTX 4090", 24),
    "rtx3090": ("RTX 3090", 24),
    "v100": ("V100", 16),
    "t4": ("T4", 16),
}
_WITHOUT_BF16 = ("V100", "T4")


def forecast(
    recipe: Recipe, gpu: str, *, gpus: int = 1, mfu: float = 0.4, price_per_gpu_hour: float | None = None
) -> None:
    """Print the memory, time and cost of the recipe on `gpus` GPUs of a kind, at an assumed MFU.

    Raises:
        InputError: the kind is unknown or lacks the recipe's precision, the batch cannot be split, or the model does
            not fit into the memory.
    """
    if gpu not in GPUS:
        raise InputError(f"unknown GPU {gpu}{did_you_mean(gpu, GPUS)}; known are {', '.join(GPUS)}")
    name, memory = GPUS[gpu]
    precision = _precision(recipe, name)
    peak = PEAKS[name][1 if precision == "fp32" else 0]
    print(f"gpus        {gpus} × {name}, {memory} GiB, {peak / 1e12:,.3g} TFLOP/s in {precision}")
    with torch.device("meta"):
        model = GPT2ScratchForCausalLM(config_without_weights(recipe, known_vocabulary(recipe)))
    batch, estimate, sharded = _fitting(model, recipe, gpus, precision, gpu)
    how = "" if gpus == 1 else ", with FSDP2" if sharded else ", with DDP"
    report_size(print, model, batch, precision, f"{gib(estimate.total)} of {memory} GiB per GPU{how}: {estimate}")
    sizes = {"n_layer": model.config.n_layer, "n_embd": model.config.n_embd, "seq_len": recipe.seq_len}
    rate = mfu * peak * gpus / flops_per_token(parameters=model.num_parameters(), **sizes)
    print(f"speed       {rate:,.0f} tokens/s: an assumption, MFU {mfu:.0%}")
    steps = report_length(print, recipe, batch, _order(recipe))
    if steps is not None:
        report_time(print, recipe, batch, steps, seconds=batch.tokens_per_step / rate, price=price_per_gpu_hour)


def _precision(recipe: Recipe, name: str) -> str:
    if recipe.mixed_precision == "bf16" and name in _WITHOUT_BF16:
        raise InputError(f"{name} has no bf16; set the recipe key mixed_precision: fp16")
    if recipe.mixed_precision == "auto":
        return "fp16" if name in _WITHOUT_BF16 else "bf16"
    return "fp32" if recipe.mixed_precision == "no" else recipe.mixed_precision


def _fitting(
    model: GPT2ScratchForCausalLM, recipe: Recipe, gpus: int, precision: str, gpu: str
) -> tuple[BatchPlan, MemoryEstimate, bool]:
    """The batch that fits into the memory, its estimate, and whether it needs FSDP2."""
    limit = int(_USABLE * GPUS[gpu][1] * 2**30)
    given = recipe.per_device_train_batch_size
    auto = given == "auto"
    settings = {"tokens_per_step": recipe.tokens_per_step, "seq_len": recipe.seq_len, "num_processes": gpus}
    on_gpus: dict[str, Any] = {"num_processes": gpus, "dtype": DTYPES[precision], "device_type": "cuda"}
    least = plan_batch(**settings, per_device=1 if given == "auto" else given)
    for size in reversed(divisors(least.sequences_per_step // gpus)) if auto else [least.per_device]:
        for sharded in (False, True)[: 1 + (gpus > 1)]:
            estimate = estimate_memory(model, recipe, sequences=size, sharded=sharded, **on_gpus)
            if estimate.total <= limit:
                return plan_batch(**settings, per_device=size), estimate, sharded
    raise InputError(
        f"{'a single sequence' if auto else f'{given} sequences'} of {recipe.seq_len:,} tokens need an estimated "
        f"{gib(estimate.total)}, more than the usable {gib(limit)} of {gpu}; set "
        + ("activation_checkpointing, or use more GPUs" if auto else "per_device_train_batch_size: auto")
    )


def _order(recipe: Recipe) -> Order | None:
    """The order of the windows, if the recipe's shard folder is complete and the length of the run depends on it."""
    folder = None if recipe.num_train_epochs is None else ShardFolder.find(Path(recipe.data_dir))
    if folder is None or not folder.complete:
        return None
    return Order([shard.tokens for shard in folder.train_shards], seq_len=recipe.seq_len, seed=recipe.seed)
