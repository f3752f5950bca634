"""What a run is made of: the accelerator and the model, built from the recipe and checked before any work starts."""

import datetime
import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env, set_seed
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from common.cli_errors import InputError
from common.hub_retry import hub_cache_error
from training.data.producing.workers import usable_cpus
from training.monitoring.trackers import chosen_trackers
from training.optim.optimizer import build_optimizer
from training.recipe import Recipe
from training.setup.fsdp import check_sharding_settings, compile_blocks, shard, shard_on_cpus_too

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gpt2_scratch import GPT2ScratchForCausalLM

# Rank 0 may draw samples, compress the validation text or write a checkpoint to a slow disk while the others wait.
PROCESS_TIMEOUT = datetime.timedelta(hours=1)


def resolve_mixed_precision(recipe: Recipe) -> str:
    """The precision of matrix products, "bf16" or "no": the recipe's, or for "auto" what the hardware has.

    What `accelerate launch --mixed_precision bf16` (or its configuration file) says goes before the hardware.
    """
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        return "bf16"
    if takes_gpus():
        cuda = torch.cuda.is_available()
        return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    capabilities: Mapping[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # older releases of torch cannot tell
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"


def takes_gpus() -> bool:
    """Whether the run is for this machine's accelerators: it has any, and the launcher was not told `use_cpu`."""
    return torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, with threads and matrix precision set for its device.

    Raises:
        InputError: a tracker that the recipe asks for is not installed, FSDP of another kind than FSDP2, or processes
            that do not meet.
    """
    check_sharding_settings()
    try:
        accelerator = Accelerator(
            # Told so outright: several CPU processes would otherwise not find each other.
            cpu=not takes_gpus(),
            mixed_precision=resolve_mixed_precision(recipe),
            log_with=chosen_trackers(recipe) or None,
            project_dir=recipe.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
        )
    except torch.distributed.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} did not meet the others at {place} "
            f"({str(error).strip().splitlines()[0].rstrip('.')}); start every machine, with the same main_process_ip "
            "and a main_process_port that is free on the first"
        ) from None
    shard_on_cpus_too(accelerator)
    if accelerator.device.type == "cpu":
        use_all_cores()
    else:
        torch.set_float32_matmul_precision("high")
    return accelerator


def least_of_all(accelerator: Accelerator, number: int) -> int:
    """The smallest of all processes' numbers."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


def refuse_too_many_processes() -> None:
    """Refuse more processes on this machine than it has devices for, before each fails over a GPU that is not there.

    Raises:
        InputError: more than the GPUs that can be seen, or without any, more than the cores.
    """
    here, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), usable_cpus()
    gpus = torch.accelerator.device_count() if takes_gpus() else 0
    if here > (gpus or max(2, cores)):
        found = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else f"no GPU to use and {cores} CPU cores"
        raise InputError(
            f"expected a GPU for each of {here} processes on this machine, found {found}; launch with --num_processes "
            f"{gpus or 1}, or another file of accelerate_configs/"
        )


def use_all_cores() -> None:
    """Share this machine's cores among its processes: launchers say OMP_NUM_THREADS=1, which leaves cores idle.

    More than one thread in OMP_NUM_THREADS is somebody's choice and is kept.
    """
    if int(os.environ.get("OMP_NUM_THREADS", "1")) == 1:
        torch.set_num_threads(max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Vocabulary(Protocol):
    """What a model needs to know of its tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids in all."""

    @property
    def end_of_text_id(self) -> int:
        """The id with which a document begins."""


def build_model(recipe: Recipe, tokenizer: Vocabulary, weights: Path | None = None) -> "GPT2ScratchForCausalLM":
    """The model to train: from `weights` (a checkpoint), from the recipe's `init_from`, or initialised as GPT-2 was.

    Raises:
        InputError: `init_from` is no GPT-2, or does not go with the recipe's tokenizer or sequence length; an attention
            implementation that is not there.
    """
    from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM

    dropout: dict[str, Any] = {
        "embd_pdrop": recipe.dropout,
        "attn_pdrop": recipe.dropout,
        "resid_pdrop": recipe.dropout,
    }
    source = weights or recipe.init_from
    set_seed(recipe.seed)
    try:
        if source is not None:
            model = GPT2ScratchForCausalLM.from_pretrained(
                source, attn_implementation=recipe.attn_implementation, dtype=torch.float32, **dropout
            )
        else:
            config = GPT2ScratchConfig(
                vocab_size=tokenizer.vocab_size,
                n_positions=recipe.positions,
                n_embd=recipe.n_embd,
                n_layer=recipe.n_layer,
                n_head=recipe.n_head,
                # The function of the official "gelu_new" in one kernel instead of eight.
                activation_function="gelu_pytorch_tanh",
                bos_token_id=tokenizer.end_of_text_id,
                eos_token_id=tokenizer.end_of_text_id,
                **dropout,
            )
            config._attn_implementation = recipe.attn_implementation
            model = GPT2ScratchForCausalLM(config)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        # from_pretrained explains what it misses in its first line; the rest is advice on other models.
        refusal = hub_cache_error(error)
        raise refusal or InputError(f"cannot build the model: {str(error).strip().splitlines()[0]}") from error
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{source} has a vocabulary of {model.config.vocab_size:,} ids, the tokenizer {recipe.tokenizer} has "
            f"{tokenizer.vocab_size:,}; prepare the corpus with that model's tokenizer"
        )
    if recipe.seq_len > model.config.n_positions:
        raise InputError(
            f"seq_len={recipe.seq_len:,} exceeds n_positions={model.config.n_positions:,} of {source}; "
            "shorten the windows"
        )
    # Without a number of its own a model gets the text-generation pipeline's 256, which runs past a short n_positions.
    if model.generation_config.max_new_tokens is None:
        model.generation_config.max_new_tokens = min(128, model.config.n_positions // 2)
    if recipe.activation_checkpointing:
        # The name since transformers 5.18; the older one warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model


def prepare(accelerator: Accelerator, model: "PreTrainedModel", recipe: Recipe) -> tuple[nn.Module, Optimizer]:
    """The model and its optimizer as this number of processes trains them: compiled, and wrapped or sharded."""
    ready: Any = model
    if accelerator.is_fsdp2:
        if recipe.compile:
            compile_blocks(model)
        shard(model, accelerator)
    elif recipe.compile:
        ready = torch.compile(model)
    # Behind the sharding: its parameters are others.
    wrapped, optimizer = accelerator.prepare(ready, build_optimizer(model, recipe))
    return wrapped, optimizer


def leave(accelerator: Accelerator) -> None:
    """End the trackers and leave the group of processes, once the prepared model and optimizer were let go of.

    What holds on to the group goes before it: torch's gloo can lock up when the group dies together with DDP.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
