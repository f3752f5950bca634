"""`--preflight --gpu a100 --gpus 8`: the memory, time and cost of a run on GPUs that are not there.

Nothing is measured: the speed follows from the operations of a token, the GPU's peak and an assumed MFU, and the price
is an assumption too. No data and no weights are needed.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from common.cli_errors import InputError, did_you_mean
from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from training.data.loading.order import Order
from training.data.shards.shard_reader import ShardFolder
from training.monitoring.throughput import PEAKS, flops_per_token
from training.recipe import Recipe
from training.setup.batch_size_finder import divisors
from training.setup.memory_estimate import MemoryEstimate, estimate_memory
from training.setup.model import config_to_start_from
from training.setup.plan import total_steps
from training.setup.preflight import gib, known_vocabulary, report_model, report_time_and_cost
from training.step.batch_plan import BatchPlan, plan_batch

_USABLE = 0.9  # of the memory: the rest is for libraries, the allocator and what torch.compile saves


class _Gpu(NamedTuple):
    """A GPU.

    Attributes:
        name: in the table of peaks.
        gib: its memory.
        price: per hour; about what rented ones cost in 2026.
    """

    name: str
    gib: int
    price: float


GPUS = {
    "a100": _Gpu("A100", 80, 1.79),
    "a100-40gb": _Gpu("A100", 40, 1.29),
    "h100": _Gpu("H100", 80, 2.99),
    "h200": _Gpu("H200", 141, 3.79),
    "b200": _Gpu("B200", 180, 5.99),
    "l40s": _Gpu("L40S", 48, 0.99),
    "l4": _Gpu("L4", 24, 0.59),
    "a10g": _Gpu("A10G", 24, 0.99),
    "rtx4090": _Gpu("RTX 4090", 24, 0.39),
    "rtx3090": _Gpu("RTX 3090", 24, 0.25),
    "v100": _Gpu("V100", 16, 0.59),
    "t4": _Gpu("T4", 16, 0.35),
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
    name, memory, usual_price = GPUS[gpu]
    precision = _precision(recipe, name)
    peak = PEAKS[name][1 if precision == "fp32" else 0]
    print(f"gpus        {gpus} × {name}, {memory} GiB, {peak / 1e12:,.3g} TFLOP/s in {precision}")
    model = _model_without_weights(recipe)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    batch, estimate, sharded = _fitting(model, recipe, gpus, dtype, int(_USABLE * memory * 2**30), gpu)
    report_model(print, model, precision)
    how = "" if gpus == 1 else ", with FSDP2" if sharded else ", with DDP"
    parts = ", ".join(f"{part} {gib(count)}" for part, count in asdict(estimate).items())
    print(f"memory      estimated {gib(estimate.total)} of {memory} GiB per GPU{how}: {parts}")
    print(f"batch       {batch.arithmetic}")
    flops = flops_per_token(
        parameters=model.num_parameters(),
        n_layer=model.config.n_layer,
        n_embd=model.config.n_embd,
        seq_len=recipe.seq_len,
    )
    rate = mfu * peak * gpus / flops
    print(f"speed       {rate:,.0f} tokens/s: an assumption, MFU {mfu:.0%}")
    steps = _steps(recipe)
    if steps is None:
        print("length      unknown: the corpus must be tokenized to know the length of an epoch")
        return
    print(f"length      {steps:,} steps, {steps * batch.tokens_per_step:,} tokens")
    seconds = batch.tokens_per_step / rate
    assumed = "" if price_per_gpu_hour is not None else ", an assumed price"
    each = usual_price if price_per_gpu_hour is None else price_per_gpu_hour
    report_time_and_cost(print, recipe, batch, steps=steps, done=0, seconds=seconds, price=each, note=assumed)


def _precision(recipe: Recipe, name: str) -> str:
    if recipe.mixed_precision == "bf16" and name in _WITHOUT_BF16:
        raise InputError(f"{name} has no bf16; set the recipe key mixed_precision: fp16")
    if recipe.mixed_precision == "auto":
        return "fp16" if name in _WITHOUT_BF16 else "bf16"
    return "fp32" if recipe.mixed_precision == "no" else recipe.mixed_precision


def _model_without_weights(recipe: Recipe) -> GPT2ScratchForCausalLM:
    if recipe.init_from is not None:
        config = config_to_start_from(recipe, recipe.init_from)
    else:
        vocabulary = known_vocabulary(recipe)
        config = GPT2ScratchConfig(
            vocab_size=vocabulary.vocab_size,
            n_positions=recipe.positions,
            **recipe.sizes,
            **vocabulary.token_ids,
        )
    with torch.device("meta"):
        return GPT2ScratchForCausalLM(config)


def _fitting(
    model: GPT2ScratchForCausalLM, recipe: Recipe, gpus: int, dtype: torch.dtype, limit: int, gpu: str
) -> tuple[BatchPlan, MemoryEstimate, bool]:
    """The batch that fits into the memory, its estimate, and whether it needs FSDP2."""
    given = recipe.per_device_train_batch_size
    settings = {"tokens_per_step": recipe.tokens_per_step, "seq_len": recipe.seq_len, "num_processes": gpus}
    least = plan_batch(**settings, per_device=1 if given == "auto" else given)
    sizes = reversed(divisors(least.sequences_per_step // gpus)) if given == "auto" else [given]
    for size in sizes:
        for sharded in (False, True)[: 1 + (gpus > 1)]:
            estimate = estimate_memory(
                model,
                recipe,
                sequences=size,
                num_processes=gpus,
                sharded=sharded,
                dtype=dtype,
                device_type="cuda",
            )
            if estimate.total <= limit:
                return plan_batch(**settings, per_device=size), estimate, sharded
    auto = given == "auto"
    raise InputError(
        f"{'a single sequence' if auto else f'{given} sequences'} of {recipe.seq_len:,} tokens need an estimated "
        f"{gib(estimate.total)}, more than the usable {gib(limit)} of {gpu}; set "
        + ("activation_checkpointing, or use more GPUs" if auto else "per_device_train_batch_size: auto")
    )


def _steps(recipe: Recipe) -> int | None:
    """Steps of the run; None if its length is in epochs of a corpus that is not tokenized yet."""
    if recipe.num_train_epochs is None:
        return total_steps(recipe, None)
    folder = ShardFolder.find(Path(recipe.data_dir))
    if folder is None or not folder.complete:
        return None
    return total_steps(recipe, Order([s.tokens for s in folder.train_shards], seq_len=recipe.seq_len, seed=recipe.seed))
