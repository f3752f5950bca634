"""The base class of all models here: initialization, loading, saving; and the input checks of their forward passes.

Loading is stricter than in transformers. A checkpoint that does not fill the model is an error instead of a warning,
and pickled weights are read only on request.
"""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import is_flash_attention_requested

from .configuration_gpt2_scratch import AUTO_MAP, GPT2ScratchConfig

# The name of the key-value cache in calls and outputs: "cache" since transformers 5.24, "past_key_values" before.
CACHE_NAME = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"
)

_LOADING_LOG = logging.getLogger("transformers.modeling_utils")

# Where packed documents begin: for flash attention, and for state-space models, whose collators pass it to all.
_FLASH_DOCUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})
_PACKED_DOCUMENTS = _FLASH_DOCUMENTS | {"seq_idx"}
# Arguments that attention implementations of transformers and vLLM read.
ATTENTION_ARGUMENTS = _PACKED_DOCUMENTS | frozenset(
    {
        "is_causal",  # flash attention, sdpa
        "kernel_options",  # flex attention
        *("read_index", "write_index", "block_table"),  # paged attention
        *("max_seqlen_q", "max_seqlen_k"),  # of paged attention in transformers 5.17
        *("logits_indices", "logits_processor_args"),  # passed along with these by continuous batching
        "attention_instances",  # vLLM
    }
)
# What the implementations of transformers, and ours, read of these. Others, such as vLLM's, get all.
_NONE: frozenset[str] = frozenset()
_READ_BY = {
    "eager": _NONE,
    "sdpa": frozenset({"is_causal"}),
    "blockwise": frozenset({"is_causal"}),
    "flex_attention": frozenset({"kernel_options"}),
}
# Read by decorators.
_READ_ELSEWHERE = frozenset({"output_hidden_states", "output_attentions", "return_dict"})
# Arguments of the official class that are not implemented here. Libraries pass them as None.
_OFFICIAL_ONLY = frozenset(
    {"token_type_ids", "encoder_hidden_states", "encoder_attention_mask", "output_router_logits"}
)


def check_arguments(
    model: "GPT2ScratchPreTrainedModel",
    arguments: dict[str, Any],
    cache: Cache | None,
    position_ids: Tensor | None,
    mask: Any,
) -> dict[str, Any]:
    """Return the arguments for the attention implementation, which also gets the `mask`.

    Without a cache, `position_ids` separate packed documents, so the implementation need not read where they begin.

    Raises:
        TypeError: an argument that is unknown, not implemented here, or not read by the attention implementation.
    """
    name_of_model, implementation = type(model).__name__, model.config._attn_implementation
    read, ignored_with_mask = ATTENTION_ARGUMENTS, _NONE
    if _is_paged(cache):
        pass
    elif is_flash_attention_requested(requested_attention_implementation=implementation):
        are_complete = all(arguments.get(name) is not None for name in _FLASH_DOCUMENTS)
        read = _READ_BY["sdpa"] | (_FLASH_DOCUMENTS if are_complete else _NONE)
        ignored_with_mask = _FLASH_DOCUMENTS
    elif implementation in _READ_BY:
        read = _READ_BY[implementation]
        ignored_with_mask = read & {"is_causal"}
    for name, value in arguments.items():
        if name in _READ_ELSEWHERE:
            continue
        if name in read and not isinstance(value, Cache):
            if mask is not None and name in ignored_with_mask and value is not None and value is not True:
                raise TypeError(
                    f"{name_of_model}.forward() got {name}, which attn_implementation={implementation!r} does not read "
                    "with padding, packed documents or a cache; leave it out, or pass a mask (batch, 1, seq, seq)"
                )
            continue
        if name not in ATTENTION_ARGUMENTS and name not in _OFFICIAL_ONLY:
            raise TypeError(f"{name_of_model}.forward() got an unexpected argument {name!r}")
        if value is None:  # libraries pass arguments that they do not use
            continue
        if name in _PACKED_DOCUMENTS and cache is None and position_ids is not None:
            continue
        if name in _OFFICIAL_ONLY:
            raise TypeError(f"{name_of_model} does not implement {name}; use transformers.GPT2LMHeadModel")
        raise TypeError(
            f"{name_of_model}.forward() got {name}, which attn_implementation={implementation!r} does not read; leave "
            "it out (without a cache, position_ids separate packed documents), or choose another implementation"
        )
    return {name: value for name, value in arguments.items() if name in read}


def single_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache, which has two names.

    Raises:
        ValueError: both are given.
        TypeError: it is neither a `Cache` nor the cache of continuous batching.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of the same argument; pass only one of them")
    found = past_key_values if cache is None else cache
    if found is not None and not isinstance(found, Cache) and not hasattr(found, "extend_read_and_write_indices"):
        raise TypeError(f"expected a cache of transformers, such as DynamicCache, found {type(found).__name__}")
    return found


def update_cache(
    cache: Cache | None, key: Tensor, value: Tensor, layer_idx: int, arguments: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return all keys and values, those of earlier tokens first, after adding `key` and `value` to the cache.

    The cache of continuous batching reads and changes the arguments of the attention implementation; before
    transformers 5.24, the implementation updates it.
    """
    if cache is None:
        return key, value
    if not _is_paged(cache):
        return cache.update(key, value, layer_idx)
    if CACHE_NAME == "cache":
        return cache.update(key, value, layer_idx, kwargs=arguments)
    arguments["cache"] = cache
    return key, value


def mask_cache(cache: Cache | None) -> dict[str, Cache | None]:
    """Return the argument of `create_causal_mask` that names the cache."""
    return {CACHE_NAME: None if CACHE_NAME != "cache" and _is_paged(cache) else cache}


def _is_paged(cache: Any) -> bool:
    """Return whether this is the cache of continuous batching (`generate_batch`)."""
    return cache is not None and not isinstance(cache, Cache)


def check_inputs(
    model: "GPT2ScratchPreTrainedModel",
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> None:
    """Check the inputs of `GPT2ScratchModel.forward`, as far as that costs nothing.

    Raises:
        ValueError: not exactly one of `input_ids` and `inputs_embeds`; a wrong number of dimensions; a sequence longer
            than n_positions; a cache under activation checkpointing; on CPU, an id or a position out of range.
    """
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        found = "neither" if inputs is None else "both"
        raise ValueError(f"expected either input_ids or inputs_embeds, found {found}; pass exactly one")
    name, shape = ("input_ids", "batch, seq") if inputs_embeds is None else ("inputs_embeds", "batch, seq, n_embd")
    if inputs.dim() != shape.count(",") + 1:
        raise ValueError(f"expected {name} of shape ({shape}), found {tuple(inputs.shape)}; reshape it")
    if inputs_embeds is None:
        model.warn_if_padding_and_no_attention_mask(inputs, attention_mask)
        check_range("input_ids", inputs, model.config.vocab_size)

    past_seq = 0 if cache is None or _is_paged(cache) else cache.get_seq_length()
    if model.gradient_checkpointing and model.training and past_seq > 0:
        raise ValueError(
            "activation checkpointing in training cannot use a key-value cache; pass the complete sequence, or disable "
            "checkpointing"
        )
    compiling = torch.compiler.is_compiling()
    if isinstance(past_seq, Tensor):  # a static cache; a compiled graph cannot read the value
        past_seq = 0 if compiling else int(past_seq)
    length, n_positions = past_seq + inputs.shape[1], model.config.n_positions
    # Packed documents have their own positions, and may be longer in total.
    if length > n_positions and (position_ids is None or (not compiling and bool(position_ids.max() >= n_positions))):
        raise sequence_too_long(None if compiling else length, n_positions)  # a compiled graph cannot print a symbol
    if position_ids is not None:
        check_range("position_ids", position_ids, n_positions)


def check_range(name: str, ids: Tensor, limit: int) -> None:
    """Raise a ValueError that names the tensor, instead of a bare IndexError, for ids outside 0 … limit - 1.

    Only on CPU and outside torch.compile: on a GPU the check would wait for the device.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if lowest < 0 or highest >= limit:
        found = lowest if lowest < 0 else highest
        raise ValueError(
            f"expected {name} from 0 to {limit - 1:,}, found {found:,}; check the tokenizer and the config"
        )


def sequence_too_long(length: int | None, n_positions: int) -> ValueError:
    """Return the error for a sequence that is longer than the position embedding."""
    found = "" if length is None else f" of {length:,} tokens"
    return ValueError(f"sequence{found} exceeds n_positions={n_positions}; shorten it, or train with more positions")


class GPT2ScratchPreTrainedModel(PreTrainedModel):
    """The base class of all models here."""

    config_class = GPT2ScratchConfig
    config: GPT2ScratchConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ScratchBlock"]  # noqa: RUF012 - the base class reads plain lists
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Old checkpoints store the causal mask as a buffer of every layer.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)attn\.(masked_)?bias$"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Prefix of weights that a checkpoint may lack: the head of a new task.
    new_head_prefix: str | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, initializer_range); set biases to zero and LayerNorm to the identity.

        The standard deviation of projections into the residual stream is divided by sqrt(2 * n_layer). The stream sums
        that many of them, and so its variance does not grow with depth (Radford et al. 2019, section 2.3).
        """
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            std = self.config.initializer_range
            if getattr(module, "is_residual_projection", False):
                std /= math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the model of a folder or Hub repository, ours or an official GPT-2, with every weight loaded.

        Arguments are those of `PreTrainedModel.from_pretrained`, but `pytorch_model.bin`, a pickle, is only read with
        `use_safetensors=False`.

        Raises:
            ValueError: weights are missing or have a wrong shape. A new classification head is allowed.
            FileNotFoundError: there is only a `pytorch_model.bin`.
        """
        if use_safetensors is None and pretrained_model_name_or_path is not None:
            folder = Path(pretrained_model_name_or_path)
            if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
                raise FileNotFoundError(
                    f"no model.safetensors in {folder}, only pytorch_model.bin, a pickle, which may run code; if you "
                    "trust it, pass use_safetensors=False and save the model again"
                )
            use_safetensors = True
        with _held_load_report() as load_report:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                use_safetensors=use_safetensors,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        mismatched = sorted(info["mismatched_keys"])
        if mismatched and not ignore_mismatched_sizes:
            found = "; ".join(
                f"{name} has shape {tuple(shape)} instead of {tuple(expected)}"
                for name, shape, expected in mismatched[:3]
            )
            raise ValueError(
                f"weights in {pretrained_model_name_or_path} do not fit config.json: {found} ({len(mismatched)} in "
                "total); correct the config, or pass ignore_mismatched_sizes=True to initialize them"
            )
        new_head = cls.new_head_prefix
        missing = sorted(name for name in info["missing_keys"] if new_head is None or not name.startswith(new_head))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks weights of {cls.__name__}: {', '.join(missing[:3])} "
                f"({len(missing)} in total); use a complete checkpoint"
            )
        for record in load_report:
            _LOADING_LOG.handle(record)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save weights, config and code; the folder loads with `trust_remote_code=True` in every Auto class."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


@contextlib.contextmanager
def _held_load_report() -> Iterator[list[logging.LogRecord]]:
    """Hold back the load report of transformers, which reads as if loading had succeeded."""
    held: list[logging.LogRecord] = []

    def is_passed_on(record: logging.LogRecord) -> bool:
        if is_report := "LOAD REPORT" in record.getMessage():
            held.append(record)
        return not is_report

    _LOADING_LOG.addFilter(is_passed_on)
    try:
        yield held
    finally:
        _LOADING_LOG.removeFilter(is_passed_on)
