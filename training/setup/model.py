"""The model to train and its optimizer."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils._triton import has_triton
from transformers import PreTrainedModel
from transformers.utils import logging

from common.cli_errors import InputError
from common.hub_retry import hub_cache_error
from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM, blockwise_attention
from gpt2_scratch.source_folder import LOADING_ERRORS, check_index, looks_like_path
from training.data.tokenization.tokenizer import Tokenizer
from training.optim.optimizer import build_optimizer
from training.recipe import Recipe
from training.setup.fsdp import shard
from training.setup.launcher import requests_compile

_FLOAT = 4  # bytes
_WORTH_COMPILING = 1000  # steps: compiling costs a minute or two


class Vocabulary(NamedTuple):
    """What a model needs to know of its tokenizer, which may not exist yet."""

    vocab_size: int
    end_of_text_id: int

    @property
    def token_ids(self) -> dict[str, int | None]:
        """The ids that the model's config has of the tokenizer."""
        return {"bos_token_id": self.end_of_text_id, "eos_token_id": self.end_of_text_id}


def build_model(
    recipe: Recipe,
    tokenizer: Tokenizer | Vocabulary,
    *,
    device_type: str,
    weights: Path | None = None,
    report: Callable[[str], object] = print,
) -> GPT2ScratchForCausalLM:
    """The model to train: from a checkpoint (`weights`), from the recipe's `init_from`, or initialized like GPT-2.

    If the recipe has more positions than `init_from`, its table of positions grows, and `report` gets a line.

    Raises:
        InputError: `init_from` is not a GPT-2 or does not fit the tokenizer, or the attention implementation is not
            available.
    """
    if weights is None:
        _check_source(recipe, tokenizer.vocab_size)
    dropout: dict[str, Any] = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), recipe.dropout)
    source, attention = weights or recipe.init_from, attention_for(recipe, device_type)
    # No progress bar for every saved model, and no messages before an error that we report in one line.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    set_seed(recipe.seed)
    try:
        if source is not None:
            check_index(source)
            model = GPT2ScratchForCausalLM.from_pretrained(
                source, attn_implementation=attention, dtype=torch.float32, **dropout
            )
        else:
            config = _new_config(recipe, tokenizer, **dropout)
            config._attn_implementation = attention
            model = GPT2ScratchForCausalLM(config)
    except InputError:
        raise
    except LOADING_ERRORS as error:
        raise hub_cache_error(error) or _cannot_build(error) from error
    if weights is None and source is not None and not all(weight.isfinite().all() for weight in model.parameters()):
        raise InputError(f"the weights in init_from {source} hold NaN or infinity; start from other weights")
    if model.config.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"{source} has a vocabulary of {model.config.vocab_size:,} ids, but tokenizer {recipe.tokenizer} has "
            f"{tokenizer.vocab_size:,}; set tokenizer to the model's, such as {source}, with a data_dir of its own"
        )
    if weights is None:
        _check_sizes(recipe, model.config)
        if recipe.positions > model.config.n_positions:
            report(_grow_positions(model, recipe.positions))
    if recipe.seq_len > model.config.n_positions:
        raise InputError(
            f"seq_len={recipe.seq_len:,} exceeds n_positions={model.config.n_positions:,} of {source}; shorten seq_len"
        )
    for key, token in tokenizer.token_ids.items():  # of `init_from`, they are another tokenizer's
        if token is not None and token != getattr(model.config, key):
            setattr(model.config, key, token)
            setattr(model.generation_config, key, token)
    # Without this the text-generation pipeline sets 256, which may exceed n_positions.
    if model.generation_config.max_new_tokens is None:
        model.generation_config.max_new_tokens = min(128, model.config.n_positions // 2)
    if recipe.activation_checkpointing:
        # The new name since transformers 5.18, where the old one warns.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def _check_source(recipe: Recipe, vocab_size: int) -> None:
    """Raise an `InputError` for an `init_from` that is no model folder, or random weights larger than the memory."""
    source = recipe.init_from
    if source is not None:
        folder, cannot = Path(source), f"cannot build the model: init_from {source}"
        if folder.is_file():
            raise InputError(
                f"{cannot} is a file; convert it with python -m gpt2_scratch.export --model {source} --output DIR "
                "--format gpt2_scratch, and set init_from to that folder"
            )
        if looks_like_path(source) and not folder.is_dir():
            raise InputError(f"{cannot} is no folder; check the path")
        if folder.is_dir() and not (folder / "config.json").is_file():  # transformers would assume a GPT-2
            raise InputError(f"{cannot} has no config.json; pass the folder of a model")
        return
    n_layer, n_embd = recipe.sizes["n_layer"], recipe.sizes["n_embd"]
    parameters = (vocab_size + recipe.positions + 12 * n_layer * n_embd) * n_embd
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if parameters * _FLOAT > memory:
        raise InputError(
            f"a model of {parameters / 1e9:,.1f}B parameters needs {parameters * _FLOAT / 2**30:,.0f} GiB, but this "
            f"machine has {memory / 2**30:,.0f} GiB of memory; lower n_layer, n_embd or n_positions"
        )


def config_without_weights(recipe: Recipe, tokenizer: Tokenizer | Vocabulary) -> GPT2ScratchConfig:
    """The config of the model to train, for which no weights are read; errors as of `build_model`."""
    if recipe.init_from is None:
        return _new_config(recipe, tokenizer)
    _check_source(recipe, 0)
    try:
        config = GPT2ScratchConfig.from_pretrained(recipe.init_from)
    except LOADING_ERRORS as error:
        raise hub_cache_error(error) or _cannot_build(error) from error
    _check_sizes(recipe, config)
    config.n_positions = max(config.n_positions, recipe.positions)  # see `_grow_positions`
    return config


def _new_config(recipe: Recipe, tokenizer: Tokenizer | Vocabulary, **dropout: Any) -> GPT2ScratchConfig:
    return GPT2ScratchConfig(
        vocab_size=tokenizer.vocab_size,
        n_positions=recipe.positions,
        **recipe.sizes,
        activation_function="gelu_pytorch_tanh",  # the official "gelu_new" in one kernel instead of eight
        **tokenizer.token_ids,
        **dropout,
    )


def _cannot_build(error: BaseException) -> InputError:
    # The first line of a from_pretrained error says what is wrong; the rest is advice on other models.
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return InputError(f"cannot build the model: {first_line}")


def _check_sizes(recipe: Recipe, config: GPT2ScratchConfig) -> None:
    """Raise an `InputError` if the recipe names a size that the model of `init_from` does not have."""
    for name, size in recipe.sizes.items():
        if size != getattr(config, name):
            raise InputError(
                f"the recipe has {name}={size:,}, but init_from {recipe.init_from} has {getattr(config, name):,}; "
                f"remove {name}, or start from another model"
            )
    if recipe.n_positions is not None and recipe.n_positions < config.n_positions:
        raise InputError(
            f"the recipe has n_positions={recipe.n_positions:,}, but init_from {recipe.init_from} has "
            f"{config.n_positions:,}, which only can grow; remove n_positions: seq_len shortens the training windows"
        )


@torch.no_grad()
def _grow_positions(model: GPT2ScratchForCausalLM, n_positions: int) -> str:
    """Give the model `n_positions` position embeddings, interpolated linearly, and return a line about it.

    The first and the last row keep their place at the ends, as in vision transformers for larger images (Dosovitskiy et
    al. 2021, section 3.2). Every position stays between its old neighbors, which trains faster than new rows.
    """
    table, old = model.transformer.wpe, model.config.n_positions
    rows = functional.interpolate(table.weight.T[None], size=n_positions, mode="linear", align_corners=True)
    table.weight = nn.Parameter(rows[0].T.contiguous())
    table.num_embeddings = model.config.n_positions = n_positions
    if hasattr(model.config, "n_ctx"):  # the same number in old config files
        model.config.n_ctx = n_positions
    return (
        f"positions: init_from has {old:,}, the recipe {n_positions:,}; the table transformer.wpe was interpolated "
        "linearly"
    )


def attention_for(recipe: Recipe, device_type: str) -> str:
    """The attention implementation to train with.

    `sdpa` becomes flex attention for a document mask on a GPU (with Triton, without dropout), and blockwise attention
    on a CPU.

    Raises:
        InputError: flex attention cannot train here, the implementation would ignore the document mask, or blockwise
            attention is requested by name.
    """
    requested = recipe.attn_implementation
    takes_flex = device_type == "cuda" and has_triton() and not recipe.dropout
    if requested == "flex_attention" and not takes_flex:
        raise InputError("attn_implementation flex_attention needs a GPU with Triton and dropout 0; set it to sdpa")
    if requested == blockwise_attention.NAME:
        raise InputError(f"attn_implementation {requested} is what sdpa becomes on a CPU; set it to sdpa")
    if recipe.document_mask and requested not in ("sdpa", "eager", "flex_attention"):
        raise InputError(
            f"attn_implementation {requested} does not separate documents; set it to sdpa, or document_mask to false"
        )
    if requested == "sdpa" and recipe.document_mask and takes_flex:
        return "flex_attention"
    return blockwise_attention.NAME if requested == "sdpa" and device_type == "cpu" else requested


def compiles(recipe: Recipe, device_type: str) -> bool:
    """Whether to compile the model; "auto" if the launcher asks, or on a GPU with Triton unless the run is short."""
    if requests_compile():
        return True
    if recipe.compile != "auto":
        return recipe.compile
    steps = recipe.max_steps or (recipe.max_tokens or math.inf) / recipe.tokens_per_step  # epochs are long
    return device_type == "cuda" and has_triton() and steps >= _WORTH_COMPILING


def prepare_for_training(
    accelerator: Accelerator, model: PreTrainedModel, recipe: Recipe
) -> tuple[nn.Module, Optimizer]:
    """The model, compiled and wrapped or sharded for the processes of the run, and its optimizer."""
    module: Any = model
    compiled = compiles(recipe, accelerator.device.type)
    # Three lengths are three graphs: one graph for any length would be slower for the rest of the run.
    dynamic = False if recipe.seq_len_warmup_steps else None
    if compiled:
        accelerator.print("compiling the model: the first steps take a minute or two, less if the cache has it")
    if accelerator.is_fsdp2:
        if compiled:  # block by block: a graph of the model would break where weights are gathered
            for block in module.base_model.h:
                block.compile(dynamic=dynamic)
        shard(model, accelerator)
    elif compiled:
        module = torch.compile(model, dynamic=dynamic)
    # After sharding, which replaces the parameters.
    # fp16 would lose small momenta: orthogonalization is in bf16 or fp32.
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    wrapped, optimizer = accelerator.prepare(module, build_optimizer(model, recipe, dtype=dtype))
    return wrapped, optimizer
