"""`--preflight`: what a run would be, found out on the machines that would run it, before it is paid for.

The processes exchange a tensor whose sum is known, the model is built, and a few of its own steps are timed on made-up
tokens. Nothing is written: the output folder stays as it is, and the corpus need not be there.
"""

import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging as transformers_logging

from common.cli_errors import InputError
from common.durations import format_duration
from training.checkpoints.checkpoint_folder import TrainerState
from training.checkpoints.resume import find_resume_point, refuse_earlier_end
from training.data.loading.order import Order
from training.data.shards.shard_reader import ShardFolder
from training.data.tokenization.tokenizer import Tokenizer, parse_train_spec
from training.monitoring.run_summary import device_name
from training.recipe import Recipe
from training.setup.batch_size_finder import fitted
from training.setup.build import build_accelerator, build_model, leave, prepare, refuse_too_many_processes
from training.setup.memory_estimate import available_memory, expected_memory
from training.setup.plan import batch_of, total_steps
from training.step.batch_plan import BatchPlan
from training.step.document_mask import attention_for
from training.step.train_step import train_step

_EXCHANGED_NUMBERS = {"cuda": 2**26, "cpu": 2**22}
_TIMED_CPU_TOKENS = 4096  # of a forward pass: a CPU takes more of them at the same rate
_FORWARD_SHARE = 1 / 3  # of the operations of a training token, for a validation token
_GIB = 2**30


@dataclass(frozen=True)
class _Ids:
    """The vocabulary of a tokenizer that need not be there yet."""

    vocab_size: int
    end_of_text_id: int


def preflight(recipe: Recipe, *, price_per_gpu_hour: float | None = None) -> None:
    """Check the processes, and print what the run would take in memory, time and money.

    Raises:
        InputError: the run could not start: settings that do not fit together, processes that do not reach each other,
            a model that does not fit.
    """
    refuse_too_many_processes()
    resume_from = find_resume_point(recipe)
    batch = batch_of(recipe)
    vocabulary, order, data = _data_of(recipe)
    accelerator = build_accelerator(recipe)
    say: Callable[[str], None] = accelerator.print
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    say(f"processes   {_devices(accelerator)}")
    say(f"exchange    {_exchange(accelerator)}")

    shaped = replace(recipe, attn_implementation=attention_for(recipe, accelerator.device.type))
    model = build_model(shaped, vocabulary, resume_from)
    mark = vocabulary.end_of_text_id if recipe.document_mask else None
    if recipe.per_device_train_batch_size == "auto":
        batch = fitted(batch, accelerator, model, recipe, mark)
    say(f"batch       {batch.arithmetic}")
    bf16 = accelerator.mixed_precision == "bf16"
    expected = expected_memory(
        model.config,
        shaped,
        sequences=batch.per_device,
        num_processes=batch.num_processes,
        sharded=accelerator.is_fsdp2,
        bf16=bf16,
        device_type=accelerator.device.type,
    )
    free = available_memory(accelerator.device, batch.num_processes)
    say(
        f"model       {model.num_parameters() / 1e6:.1f}M parameters, {model.config.n_layer} layers, width "
        f"{model.config.n_embd}, vocabulary {model.config.vocab_size:,}, in {'bf16' if bf16 else 'fp32'}"
    )
    say(
        f"memory      {_gib(expected.total)} a device by estimate: weights {_gib(expected.weights)}, gradients "
        f"{_gib(expected.gradients)}, optimizer {_gib(expected.optimizer)}, activations {_gib(expected.activations)}"
        + (f"; {_gib(free)} free" if free else "")
    )
    say(f"data        {data}")
    unknown = recipe.num_train_epochs is not None and order is None
    steps = None if unknown else total_steps(recipe, order)
    done = TrainerState.read(resume_from).step if resume_from else 0
    if steps is not None:
        if resume_from is not None:
            refuse_earlier_end(resume_from, done, steps)
        tokens = steps * batch.tokens_per_step
        going_on = f"; {done:,} steps are done" if done else ""
        say(f"length      {steps:,} steps, {tokens:,} tokens{going_on}")
    else:
        say("length      unknown: epochs have no length before the corpus is tokenised")

    wrapped, optimizer = prepare(accelerator, model, shaped)
    seconds, how = _seconds_of_a_step(accelerator, wrapped, optimizer, batch, recipe, mark)
    say(f"speed       {batch.tokens_per_step / seconds:,.0f} tokens/s, {seconds:.3g} s a step: {how}")
    if accelerator.device.type == "cuda":
        say(f"            {_gib(torch.cuda.max_memory_allocated(accelerator.device))} was the most memory in use")
    if steps is not None:
        hours = _hours(recipe, batch, steps=steps, done=done, seconds=seconds)
        say(f"time        {_spelled_hours(hours)}, validation included; samples, eval_tasks and checkpoints not")
        if price_per_gpu_hour is not None:
            cost = hours * batch.num_processes * price_per_gpu_hour
            say(f"cost        {cost:,.2f}, at {price_per_gpu_hour:,.2f} an hour for each of {batch.num_processes}")
    say("Nothing was started or written. Without --preflight, the same command trains.")
    del wrapped, optimizer
    leave(accelerator)


def _data_of(recipe: Recipe) -> tuple[_Ids, Order | None, str]:
    """The ids of the recipe's tokenizer, the order of its windows once all shards are there, and the state of both."""
    path = Path(recipe.data_dir)
    folder = ShardFolder.find(path)
    manifest = folder.manifest if folder else None
    if manifest is not None:
        ids = _Ids(manifest.vocab_size, manifest.end_of_text_id)
    elif (trained := parse_train_spec(recipe.tokenizer)) is not None:
        ids = _Ids(trained, trained - 1)
    elif recipe.tokenizer == "gpt2":
        ids = _Ids(50_257, 50_256)
    else:
        tokenizer = Tokenizer.load(recipe.tokenizer)
        ids = _Ids(tokenizer.vocab_size, tokenizer.end_of_text_id)
    if folder is not None and folder.complete:
        sizes = [shard.tokens for shard in folder.train_shards]
        order = Order(sizes, seq_len=recipe.seq_len, seed=recipe.seed)
        return ids, order, f"{sum(sizes):,} training tokens in {path}"
    ready = f"{len(manifest.shards)} shards are in {path}" if manifest is not None else f"nothing is in {path} yet"
    return ids, None, f"{ready}; training would have {recipe.corpus} tokenised beside it"


def _devices(accelerator: Accelerator) -> str:
    """Processes, machines and devices, in words; all processes take part."""
    found = gather_object([(socket.gethostname(), device_name(accelerator.device))])
    machines = len({host for host, _ in found})
    devices = ", ".join(f"{count} × {name}" for name, count in Counter(name for _, name in found).items())
    return f"{len(found)} on {machines} machine{'s' if machines > 1 else ''}: {devices}"


def _exchange(accelerator: Accelerator) -> str:
    """How fast the processes add up a tensor, after its sum was found right on each of them.

    Raises:
        InputError: it was not.
    """
    processes = accelerator.num_processes
    if processes == 1:
        return "one process has nobody to exchange with"
    numbers = _EXCHANGED_NUMBERS.get(accelerator.device.type, 2**22)
    expected = processes * (processes + 1) / 2
    seconds = []
    for _ in range(6):
        tensor = torch.full((numbers,), accelerator.process_index + 1.0, device=accelerator.device)
        _wait(accelerator)
        start = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        _wait(accelerator)
        seconds.append(time.perf_counter() - start)
        if not bool((tensor == expected).all()):
            raise InputError(
                f"process {accelerator.process_index}: expected an all-reduce over {processes} processes to give "
                f"{expected:g}, found {tensor[tensor != expected][0].item():g}; mend the connection before training"
            )
    # Of n processes, each sends and receives 2(n-1)/n of the tensor, however they are connected.
    sent = 2 * (processes - 1) / processes * numbers * tensor.element_size()
    rate = sent / statistics.median(seconds[1:]) / 1e9
    return f"all-reduce of {numbers * tensor.element_size() // 2**20} MiB is right, at {rate:.3g} GB/s for each process"


def _seconds_of_a_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batch: BatchPlan,
    recipe: Recipe,
    end_of_text_id: int | None,
) -> tuple[float, str]:
    """Seconds of an optimizer step, and how they were found: from steps of one and of two forward passes.

    What the second pass adds is the time of one; the rest is the exchange of gradients and the update, once a step.
    """
    sequences = batch.per_device
    if accelerator.device.type == "cpu":
        sequences = min(sequences, max(1, _TIMED_CPU_TOKENS // recipe.seq_len))
    ids = torch.ones(sequences, recipe.seq_len, dtype=torch.int64)
    model.train()

    def seconds_of(passes: int) -> float:
        start = time.perf_counter()
        train_step(
            accelerator,
            model,
            optimizer,
            repeat((ids, ids)),
            accumulation_steps=passes,
            learning_rate=recipe.learning_rate,
            max_grad_norm=recipe.max_grad_norm,
            end_of_text_id=end_of_text_id,
        )
        _wait(accelerator)
        return time.perf_counter() - start

    try:
        for passes in (1, 2):  # compiles, and finds its buffers
            seconds_of(passes)
        timed = [(seconds_of(1), seconds_of(2)) for _ in range(3)]
    except torch.OutOfMemoryError:
        raise InputError(
            f"{batch.per_device} sequences of {recipe.seq_len:,} tokens do not fit into the memory of "
            f"{accelerator.device}; lower per_device_train_batch_size, or set it to auto"
        ) from None
    short, long = (statistics.median(column) for column in zip(*timed, strict=True))
    forward_and_backward = min(max(long - short, short / 4), short)
    seconds = short - forward_and_backward
    seconds += batch.accumulation_steps * forward_and_backward * batch.per_device / sequences
    return seconds, f"the median of 3 steps here, of {sequences} × {recipe.seq_len:,} tokens to a forward pass"


def _hours(recipe: Recipe, batch: BatchPlan, *, steps: int, done: int, seconds: float) -> float:
    """Hours of the steps that are left and of their validations."""
    every = recipe.eval_steps or steps
    validations = steps // every - done // every + (steps % every > 0)  # one at the end at any rate
    scored = validations * recipe.eval_tokens * _FORWARD_SHARE
    return ((steps - done) + scored / batch.tokens_per_step) * seconds / 3600


def _wait(accelerator: Accelerator) -> None:
    """Wait for this process's device."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _spelled_hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours:.4f} hours ({format_duration(3600 * hours)})"
