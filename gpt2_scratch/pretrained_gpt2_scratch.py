"""What the ecosystem asks of every model here: how its weights begin, how it is loaded, how it is saved.

The mathematics stand in `modeling_gpt2_scratch.py`; this is the contract around it. Where it differs from Hugging
Face's default, it is stricter: a checkpoint that does not fill the model is an error instead of a warning, and a pickle
is read only when asked for.
"""

import dataclasses
import functools
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .configuration_gpt2_scratch import AUTO_MAP, GPT2ScratchConfig

# The name of the key-value cache in calls and outputs: "cache" since transformers 5.24, "past_key_values" before.
CACHE_NAME = (
    "cache" if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else ("past_key_values")
)

# Everything that an attention implementation of transformers or vLLM may read, passed through to it.
ATTENTION_ARGUMENTS = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal"),  # flash attention
        "kernel_options",  # flex attention
        *("read_index", "write_index", "block_table"),  # paged attention
        *("logits_indices", "logits_processor_args"),  # part of the same call; continuous batching reads them itself
        "attention_instances",  # vLLM
    }
)
# Read outside the model's own forward: by `capture_outputs`, and by the loss of a classification head.
_READ_ELSEWHERE = frozenset({"output_hidden_states", "output_attentions", "return_dict", "num_items_in_batch"})
# Arguments of the official class that are not implemented here. Libraries pass them as None.
_OFFICIAL_ONLY = frozenset(
    {"token_type_ids", "encoder_hidden_states", "encoder_attention_mask", "output_router_logits"}
)


def check_arguments(model_class: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for the attention implementation, and refuse every argument that nothing would read.

    Raises:
        TypeError: an argument of the official class that is not implemented here, or an unknown one.
    """
    for name, value in arguments.items():
        if name in ATTENTION_ARGUMENTS or name in _READ_ELSEWHERE or (name in _OFFICIAL_ONLY and value is None):
            continue
        if name in _OFFICIAL_ONLY:
            raise TypeError(f"{model_class.__name__} does not implement {name}; use transformers.GPT2LMHeadModel")
        raise TypeError(f"{model_class.__name__}.forward() got an unexpected argument {name!r}; nothing would read it")
    return {name: value for name, value in arguments.items() if name in ATTENTION_ARGUMENTS}


def the_one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Return the cache by whichever of its two names it was passed.

    Raises:
        ValueError: two caches.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


def residual_projection(n_in: int, n_embd: int) -> Conv1D:
    """Return the affine layer by which attention or MLP enters the residual stream, marked for its smaller init.

    The mark is on the layer itself because `_init_weights` never sees modules that own no parameters.
    """
    projection = Conv1D(n_embd, n_in)
    projection.enters_residual_stream = True
    return projection


def check_dimensions(**expected: tuple[Tensor | None, str]) -> None:
    """Refuse tensors that have not the dimensions whose names follow them."""
    for name, (tensor, dimensions) in expected.items():
        if tensor is not None and tensor.dim() != dimensions.count(",") + 1:
            raise ValueError(f"expected {name} of shape ({dimensions}), found {tuple(tensor.shape)}; reshape it")


def check_ids(name: str, ids: Tensor, limit: int) -> None:
    """Refuse ids outside 0 … limit - 1 with their name, instead of a bare IndexError.

    Only where looking costs nothing: on a GPU it would wait for the device, and a compiled graph cannot.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if lowest < 0 or highest >= limit:
        found = lowest if lowest < 0 else highest
        raise ValueError(
            f"expected {name} from 0 to {limit - 1:,}, found {found:,}; check the tokenizer and the config"
        )


def too_long(length: int | None, n_positions: int) -> ValueError:
    """Return the refusal of a sequence that the position embedding has no rows for."""
    found = "" if length is None else f" of {length:,} tokens"
    return ValueError(f"sequence{found} exceeds n_positions={n_positions}; shorten it, or train with more positions")


class GPT2ScratchPreTrainedModel(PreTrainedModel):
    """The base of all models here."""

    config_class = GPT2ScratchConfig
    config: GPT2ScratchConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2ScratchBlock"]  # noqa: RUF012 - the base class reads plain lists
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    # Old checkpoints carry the causal mask as a buffer of every layer.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)attn\.(masked_)?bias$"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Weights that a checkpoint of another class may lack: the head of a new task.
    new_head_prefix: str | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from N(0, initializer_range), biases zero, LayerNorm the identity.

        Projections into the residual stream are drawn smaller by sqrt(2 * n_layer): that many of them are summed up,
        and so the variance of the stream does not grow with depth (Radford et al. 2019, section 2.3).
        """
        super()._init_weights(module)
        if isinstance(module, Conv1D):
            std = self.config.initializer_range
            if getattr(module, "enters_residual_stream", False):
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
        """Return the model of a folder or Hub id, with every weight from there.

        Arguments:
            pretrained_model_name_or_path: of our models or of official GPT-2 ones.
            args: as for `PreTrainedModel.from_pretrained`, like all arguments that are not listed here.
            use_safetensors: False reads `pytorch_model.bin` instead. Where we differ from Hugging Face: this must be
                asked for, because such a file is a pickle.
            ignore_mismatched_sizes: draw weights anew whose shapes do not fit, instead of raising.
            output_loading_info: return the model and what was missing, unexpected or mismatched.
            kwargs: the rest.

        Raises:
            ValueError: when weights are missing or have another shape. A classification head may be new.
            FileNotFoundError: when there is only a `pytorch_model.bin`.
        """
        if use_safetensors is None and pretrained_model_name_or_path is not None:
            _refuse_pickle(Path(pretrained_model_name_or_path))
            use_safetensors = True
        # The base class's report of what does not fit suggests to go on regardless: it is shown when we do.
        reports: list[logging.LogRecord] = []
        logger = logging.getLogger("transformers.modeling_utils")
        hold_back = functools.partial(_hold_back, reports)
        logger.addFilter(hold_back)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *args,
                use_safetensors=use_safetensors,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs,
            )
        finally:
            logger.removeFilter(hold_back)
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            found = "; ".join(
                f"{name} of shape {tuple(expected)}, found {tuple(shape)}"
                for name, shape, expected in sorted(info["mismatched_keys"])[:3]
            )
            raise ValueError(
                f"expected {found}, in {pretrained_model_name_or_path}: weights and config.json do not belong together "
                f"({len(info['mismatched_keys'])} such weights); correct the config, or pass "
                "ignore_mismatched_sizes=True to begin with new ones"
            )
        new_head = cls.new_head_prefix
        missing = sorted(name for name in info["missing_keys"] if new_head is None or not name.startswith(new_head))
        if missing:
            raise ValueError(
                f"expected every weight of {cls.__name__} in {pretrained_model_name_or_path}, found {len(missing)} "
                f"missing: {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}; take a complete checkpoint"
            )
        for report in reports:
            logger.handle(report)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration and code, so that the folder loads under every Auto class it can serve."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


def _hold_back(reports: list[logging.LogRecord], record: logging.LogRecord) -> bool:
    """Keep a load report for later; a filter of a logger, which passes on all else."""
    is_report = "LOAD REPORT" in record.getMessage()
    if is_report:
        reports.append(record)
    return not is_report


def _refuse_pickle(folder: Path) -> None:
    """Say how to read a local folder with nothing but a pickle; `from_pretrained` says the rest of what can fail."""
    if any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"expected model.safetensors in {folder}, found only pytorch_model.bin, a pickle, which may run code; "
            "if you trust it, pass use_safetensors=False and save the model again"
        )
