"""A GGUF file of a model folder, for llama.cpp, Ollama and LM Studio.

The file holds weights, sizes and tokenizer. Weights are read, cast and written one at a time. llama.cpp computes GPT-2
with the tanh approximation of GELU; a model that it would compute differently is refused.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common.cli_errors import InputError
from common.json_files import read_json_object
from common.tokenizer_json import adds_special_tokens

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .modeling_gpt2_scratch import GPT2ScratchForCausalLM
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel
from .source_folder import bare_name, is_gpt2_tokenizer, weight_headers

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")


def write_gguf(
    source: Path, files: Sequence[str], model: GPT2ScratchPreTrainedModel, path: Path, name: str, dtype: str | None
) -> str:
    """Write the GGUF file of a checked model folder with these weight files; return a phrase on their precision.

    Args:
        source: the model folder, with tokenizer.json.
        files: names of its weight files.
        model: the model that its config.json describes, on the meta device.
        path: the file to write.
        name: the model's name in the file.
        dtype: one of `GGUF_DTYPES` for the weight matrices; None keeps that of the token embedding. As in llama.cpp's
            converter, vectors and the position embedding are always f32, and rows that do not divide into blocks of 32
            are f16 instead of q8_0.

    Raises:
        InputError: the `gguf` package is missing, or llama.cpp cannot compute this model or tokenizer.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("--format gguf needs the package gguf: pip install -c constraints.txt -e '.[gguf]'") from None
    _check_architecture(model)
    headers = {bare_name(name): (kind, shape) for name, kind, shape in weight_headers(source, files)}
    if model.config.tie_word_embeddings:
        headers.pop("lm_head.weight", None)  # a copy of the token embedding
    dtype = dtype or {"F16": "f16", "BF16": "bf16"}.get(headers["wte.weight"][0], "f32")

    types: dict[str, GGMLQuantizationType] = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    with contextlib.closing(gguf.GGUFWriter(path, "gpt2")) as writer:
        _add_sizes(writer, model.config, name)
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, source, model.config)
        for weight, (_, shape) in headers.items():
            shape = shape[::-1] if _is_affine(weight) else shape
            types[weight] = _type_of(weight, shape, dtype)
            block, size = gguf.GGML_QUANT_SIZES[types[weight]]
            nbytes = math.prod(shape) // block * size
            official = weight if weight == "lm_head.weight" else f"transformer.{weight}"
            name_in_file = names.get_name(official, try_suffixes=(".weight", ".bias"))
            writer.add_tensor_info(str(name_in_file), shape, np.dtype("float32"), nbytes, types[weight])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, values in _weights(source, files):
            if weight not in types:
                continue
            largest = values.abs().max()
            if types[weight] == gguf.GGMLQuantizationType.F16 and largest > torch.finfo(torch.float16).max:
                raise InputError(f"{weight} holds {largest:.3g}, too large for f16; use --dtype bf16")
            writer.write_tensor_data(gguf.quantize(values.float().numpy(), types[weight]))
    coarser = sum(one == gguf.GGMLQuantizationType.F16 for one in types.values()) if dtype == "q8_0" else 0
    return f"weights in {dtype}" + (f", {coarser} in f16 (rows not divisible by 32)" if coarser else "")


def _check_architecture(model: GPT2ScratchPreTrainedModel) -> None:
    config = model.config
    if not isinstance(model, GPT2ScratchForCausalLM):
        raise InputError(
            f"--format gguf holds language models, not a {type(model).__name__}; use --format gpt2, which keeps heads"
        )
    if config.activation_function not in _TANH_GELU:
        raise InputError(
            f"llama.cpp computes GPT-2 with activation_function gelu_new, not {config.activation_function}, and gives "
            "other logits; use --format gpt2"
        )
    if not config.scale_attn_weights:
        raise InputError("llama.cpp always scales attention scores, unlike this model; use --format gpt2")


def _add_sizes(writer: "GGUFWriter", config: GPT2ScratchConfig, name: str) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_tokenizer(writer: "GGUFWriter", source: Path, config: GPT2ScratchConfig) -> None:
    """Add vocabulary, merges and special tokens; ids that the tokenizer lacks are filled up to the vocabulary size."""
    from gguf import TokenType

    path = source / "tokenizer.json"
    try:
        data = read_json_object(path)
        if adds_special_tokens(data.get("post_processor")):
            raise InputError(
                f"{path} adds special tokens to every text, which llama.cpp would not do; use --format gpt2"
            )
        if not is_gpt2_tokenizer(data):
            raise InputError(
                f"{path} is not a byte-level BPE with GPT-2's pre-tokenization, the only one for GPT-2 in llama.cpp; "
                "use --format gpt2"
            )
        tokens = {number: (text, TokenType.NORMAL) for text, number in data["model"]["vocab"].items()}
        for token in data.get("added_tokens") or []:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            tokens[token["id"]] = (token["content"], kind)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    except OSError:
        raise InputError(f"no tokenizer.json in {source}; a GGUF file contains the tokenizer: add it there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a valid tokenizer ({error!r}); save the tokenizer again") from error
    if max(tokens, default=-1) >= config.vocab_size:
        raise InputError(
            f"{path} has the id {max(tokens):,}, but config.json says vocab_size={config.vocab_size:,}; use the "
            "tokenizer that belongs to this model"
        )
    ids = range(config.vocab_size)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    end = next((one for one in ends if one in ids), None)
    if end is None:
        raise InputError(
            f"config.json has eos_token_id {config.eos_token_id}, which is not a token of the model; llama.cpp would "
            "end texts at token 11: set it to the id of the end-of-text token"
        )
    entries = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in ids]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text for text, _ in entries])
    writer.add_token_types([kind for _, kind in entries])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(end)
    bos, pad = config.bos_token_id, config.pad_token_id
    writer.add_bos_token_id(bos if bos is not None and bos in ids else end)
    if pad is not None and pad in ids:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(False)


def _is_affine(weight: str) -> bool:
    """Return whether a weight is that of a Conv1D, stored as (in, out); llama.cpp multiplies with (out, in)."""
    return weight.startswith("h.") and weight.endswith(".weight") and ".ln_" not in weight


def _type_of(weight: str, shape: tuple[int, ...], dtype: str) -> "GGMLQuantizationType":
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1 or weight == "wpe.weight":
        return Type.F32
    return Type.F16 if dtype == "q8_0" and shape[-1] % 32 else Type[dtype.upper()]


def _weights(source: Path, files: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its bare name, one in memory at a time, affine ones as (out, in)."""
    for file in files:
        with safe_open(source / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                weight = weights.get_tensor(name)
                yield bare_name(name), weight.t().contiguous() if _is_affine(bare_name(name)) else weight
