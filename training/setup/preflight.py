"""`--preflight`: check a run on the hardware that would train it, and report its memory, time and cost.

The ranks all-reduce a tensor whose sum is known, the model is built, and a few steps are timed on made-up tokens.
Nothing is written, and the corpus need not be tokenized yet: what training would refuse is refused.
"""

import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from common.cli_errors import InputError, is_out_of_memory
from common.durations import format_duration
from training.checkpoints.checkpoint_folder import TrainerState
from training.checkpoints.resume import check_end, find_resume_point, refuse_other_data
from training.data.loading.order import Order
from training.data.tokenization.tokenizer import Tokenizer, load_tokenizer, parse_train_spec
from training.monitoring.task_evaluation import TaskSet
from training.monitoring.throughput import device_name
from training.recipe import Recipe
from training.setup.accelerator import build_accelerator, check_launch, shut_down
from training.setup.memory import available_memory, estimate_memory, find_batch_size, gib
from training.setup.model import Vocabulary, build_model, prepare_for_training
from training.setup.plan import batch_of, check_shards, total_steps
from training.setup.training_data import check_data, tokenizer_of_foreign_shards
from training.step.batch_plan import BatchPlan
from training.step.precision import autocast_dtype, precision_name
from training.step.train_step import train_step

_TIMED_CPU_TOKENS = 4096  # per forward pass; a CPU is not faster with more
_FORWARD_SHARE = 1 / 3  # FLOPs of a validation token relative to a training token


class _Data(NamedTuple):
    """What is known of the data before training."""

    tokenizer: Tokenizer | Vocabulary
    order: Order | None  # of the windows, if the shard folder is complete
    tasks: TaskSet | None  # None too if the tokenizer does not exist yet
    state: str  # of the folder, for the report


def preflight(recipe: Recipe, *, price_per_gpu_hour: float | None = None) -> None:
    """Check the processes, and print the memory, time and cost of the run.

    Raises:
        InputError: the run could not start: incompatible settings, processes that cannot communicate, or a model that
            does not fit into memory.
    """
    check_launch(recipe)
    resume_from = find_resume_point(recipe)
    batch = batch_of(recipe)
    data = _inspect_data(recipe, resume_from)
    accelerator = build_accelerator(recipe)
    report = accelerator.print
    report(f"processes   {_devices(accelerator)}")
    report(f"all-reduce  {_check_all_reduce(accelerator)}")

    model = build_model(recipe, data.tokenizer, device_type=accelerator.device.type, weights=resume_from, report=report)
    if data.tasks is not None:
        data.tasks.check_fit(model.config)
    if recipe.per_device_train_batch_size == "auto":
        batch = find_batch_size(batch, accelerator, model, recipe)
    estimate = estimate_memory(
        model,
        recipe,
        sequences=batch.per_device,
        num_processes=batch.num_processes,
        sharded=accelerator.is_fsdp2,
        dtype=autocast_dtype(accelerator),
        device_type=accelerator.device.type,
    )
    free = available_memory(accelerator.device, batch.num_processes)
    memory = f"{gib(estimate.total)} per device: {estimate}" + (f"; {gib(free)} free" if free else "")
    report_size(report, model, batch, precision_name(accelerator), memory)
    report(f"data        {data.state}")
    done = TrainerState.read(resume_from).step if resume_from else 0
    steps = report_length(report, recipe, batch, data.order, done)
    if resume_from is not None and steps is not None:
        check_end(resume_from, done, steps)
    wrapped, optimizer = prepare_for_training(accelerator, model, recipe)
    seconds, method = _seconds_per_step(accelerator, wrapped, optimizer, batch, recipe)
    report(f"speed       {batch.tokens_per_step / seconds:,.0f} tokens/s, {seconds:.3g} s per step: {method}")
    if accelerator.device.type == "cuda":
        report(f"            peak memory {gib(torch.cuda.max_memory_allocated(accelerator.device))}")
    if steps is not None:
        report_time(report, recipe, batch, steps, done, seconds=seconds, price=price_per_gpu_hour)
    report("Nothing was started or written. Run the same command without --preflight to train.")
    del wrapped, optimizer
    shut_down(accelerator)


def report_size(
    report: Callable[[str], None], model: PreTrainedModel, batch: BatchPlan, precision: str, memory: str
) -> None:
    """Print the batch, the size of the model, and the estimated memory."""
    report(f"batch       {batch.arithmetic}")
    report(
        f"model       {model.num_parameters() / 1e6:.1f}M parameters, {model.config.n_layer} layers, width "
        f"{model.config.n_embd}, vocabulary {model.config.vocab_size:,}, in {precision}"
    )
    report(f"memory      estimated {memory}")


def report_length(
    report: Callable[[str], None], recipe: Recipe, batch: BatchPlan, order: Order | None, done: int = 0
) -> int | None:
    """Print and return the steps of the run; None for a length in epochs without the order of the windows."""
    if recipe.num_train_epochs is not None and order is None:
        report("length      unknown: the corpus must be tokenized to know the length of an epoch")
        return None
    steps = total_steps(recipe, order)
    resumed = f"; resumes after step {done:,}" if done else ""
    report(f"length      {steps:,} steps, {steps * batch.tokens_per_step:,} tokens{resumed}")
    return steps


def report_time(
    report: Callable[[str], None],
    recipe: Recipe,
    batch: BatchPlan,
    steps: int,
    done: int = 0,
    *,
    seconds: float,
    price: float | None,
) -> None:
    """Print the time of the remaining steps and their validations, and its cost at a price per GPU hour.

    A step takes `seconds`.
    """
    every = recipe.eval_steps or steps
    validations = steps // every - done // every + (steps % every > 0)  # always one at the end
    scored = validations * recipe.eval_tokens * _FORWARD_SHARE
    hours = ((steps - done) + scored / batch.tokens_per_step) * seconds / 3600
    spelled = f"{hours:,.1f} hours" if hours >= 1 else f"{hours:.4f} hours ({format_duration(3600 * hours)})"
    report(f"time        {spelled} with validation, without samples, eval_tasks and checkpoints")
    if price is not None:
        gpus = batch.num_processes
        report(f"cost        {hours * gpus * price:,.2f} at {price:,.2f} per GPU hour on {gpus}")


def known_vocabulary(recipe: Recipe) -> Tokenizer | Vocabulary:
    """The size of the recipe's vocabulary, without a download or a training where possible."""
    trained = parse_train_spec(recipe.tokenizer)
    if trained is not None:
        return Vocabulary(trained, trained - 1)
    if recipe.tokenizer == "gpt2":  # no download, where the network may be out of reach
        return Vocabulary(50_257, 50_256)
    return load_tokenizer(recipe.tokenizer)


def _inspect_data(recipe: Recipe, resume_from: Path | None) -> _Data:
    """The data of the run, with the checks that training makes."""
    folder, spec = check_data(recipe, print)
    tokenizer: Tokenizer | Vocabulary
    if folder is not None and folder.manifest is not None:
        tokenizer = folder.load_tokenizer(recipe.tokenizer)
    elif spec is None:
        tokenizer = tokenizer_of_foreign_shards(recipe)
    elif recipe.eval_tasks and parse_train_spec(recipe.tokenizer) is None:  # to check the tasks
        tokenizer = load_tokenizer(recipe.tokenizer)
    else:
        tokenizer = known_vocabulary(recipe)
    tasks = TaskSet(recipe, tokenizer) if recipe.eval_tasks and isinstance(tokenizer, Tokenizer) else None
    if folder is not None and folder.can_train(folder.complete) and isinstance(tokenizer, Tokenizer):
        shards = check_shards(recipe, folder, tokenizer)
        if resume_from is not None:
            refuse_other_data(TrainerState.read(resume_from), folder, tokenizer, recipe)
        if folder.complete:
            sizes = [shard.tokens for shard in folder.train_shards]
            return _Data(tokenizer, shards.order, tasks, f"{sum(sizes):,} training tokens in {folder.path}")
    found = f"{len(folder.shards)} complete shards in {folder.path}" if folder else f"nothing in {recipe.data_dir} yet"
    return _Data(tokenizer, None, tasks, f"{found}; training would tokenize {recipe.corpus} in the background")


def _devices(accelerator: Accelerator) -> str:
    """The processes, nodes and devices of the run; a collective call."""
    found = gather_object([(socket.gethostname(), device_name(accelerator.device))])
    nodes = len({host for host, _ in found})
    devices = ", ".join(f"{count} × {name}" for name, count in Counter(name for _, name in found).items())
    return f"{len(found)} on {nodes} node{'s' if nodes > 1 else ''}: {devices}"


def _check_all_reduce(accelerator: Accelerator) -> str:
    """The bandwidth of an all-reduce, or an `InputError` if its sum is wrong."""
    processes, device = accelerator.num_processes, accelerator.device
    if processes == 1:
        return "skipped with one process"
    numbers = 2**26 if device.type == "cuda" else 2**22
    expected = processes * (processes + 1) / 2
    seconds = []
    for _ in range(6):
        tensor = torch.full((numbers,), accelerator.process_index + 1.0, device=device)
        seconds.append(_seconds(device, partial(torch.distributed.all_reduce, tensor)))
        if not bool((tensor == expected).all()):
            raise InputError(
                f"rank {accelerator.process_index}: an all-reduce over {processes} processes gave "
                f"{tensor[tensor != expected][0].item():g} instead of {expected:g}; fix the interconnect first"
            )
    # Each of n processes sends and receives at least 2(n-1)/n of the tensor.
    sent = 2 * (processes - 1) / processes * numbers * tensor.element_size()
    rate = sent / statistics.median(seconds[1:]) / 1e9
    return f"{numbers * tensor.element_size() // 2**20} MiB summed correctly, {rate:.3g} GB/s per process"


def _seconds_per_step(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, batch: BatchPlan, recipe: Recipe
) -> tuple[float, str]:
    """Seconds per optimizer step, extrapolated from steps of one and of two micro-steps, and how it was measured.

    The second micro-step adds the time of a forward and backward pass; the rest is gradient exchange and update.
    """
    sequences = batch.per_device
    if accelerator.device.type == "cpu":
        sequences = min(sequences, max(1, _TIMED_CPU_TOKENS // recipe.seq_len))
    ids = torch.ones(sequences, recipe.seq_len, dtype=torch.int64)
    model.train()

    step = partial(
        train_step,
        accelerator,
        model,
        optimizer,
        repeat((ids, ids)),
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_grad_norm,
        end_of_text_id=0 if recipe.document_mask else None,
    )
    steps = [partial(step, accumulation_steps=micro_steps) for micro_steps in (1, 2)]
    try:
        # The first ones warm up: they compile, and allocate buffers.
        timed = [[_seconds(accelerator.device, run) for run in steps] for _ in range(4)][1:]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"{batch.per_device} sequences of {recipe.seq_len:,} tokens do not fit into the memory of "
            f"{accelerator.device}; lower per_device_train_batch_size, or set it to auto"
        ) from None
    short, long = (statistics.median(column) for column in zip(*timed, strict=True))
    forward_backward = min(max(long - short, short / 4), short)
    seconds = short - forward_backward + batch.accumulation_steps * forward_backward * batch.per_device / sequences
    return seconds, f"median of 3 steps with {sequences} × {recipe.seq_len:,} tokens per forward pass"


def _seconds(device: torch.device, action: Callable[[], object]) -> float:
    """Seconds that an action takes on a device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start
