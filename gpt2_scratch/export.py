"""Converts a model folder between `gpt2`, which transformers loads without our code, and `gpt2_scratch`.

    python -m gpt2_scratch.export --model runs/quickstart/model --output my-gpt2 --format gpt2
    python -m gpt2_scratch.export --model openai-community/gpt2 --output gpt2-ours --format gpt2_scratch

Both formats have the same weight names and layouts. Weight files are copied, so a round trip returns every byte; only
config.json and the code change. `--dtype` casts the weights, one file at a time. No model is built in memory: weights
are checked by the headers of their files.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from common.cli_errors import CommandParser, InputError, one_line, run_command

from .configuration_gpt2_scratch import AUTO_MAP, GPT2ScratchConfig
from .heads_gpt2_scratch import (
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchForTokenClassification,
)
from .modeling_gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchModel
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel

FORMATS = ("gpt2", "gpt2_scratch")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OFFICIAL_NAMES: dict[type[GPT2ScratchPreTrainedModel], str] = {
    GPT2ScratchForCausalLM: "GPT2LMHeadModel",
    GPT2ScratchForSequenceClassification: "GPT2ForSequenceClassification",
    GPT2ScratchForTokenClassification: "GPT2ForTokenClassification",
    GPT2ScratchForQuestionAnswering: "GPT2ForQuestionAnswering",
    GPT2ScratchModel: "GPT2Model",
}
_CLASSES = {name: ours for ours, official in _OFFICIAL_NAMES.items() for name in (official, ours.__name__)}
_FLOATING = ("BF16", "F16", "F32", "F64")  # names of safetensors
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Tokenizer, generation config, model card and its images. Not weights of other frameworks, nor optimizer state.
_COPIED = ("*.json", "*.txt", "*.jinja", "*.md", "*.png", "LICENSE*")
_NOT_COPIED = {"config.json", _INDEX, "pytorch_model.bin.index.json"}


def export(model: str, output: Path, model_format: str, dtype: torch.dtype | None = None) -> str:
    """Write the model of a folder or Hub repository to a new folder, which appears only when it is complete.

    Args:
        model: a folder or Hub repository of either format, with config.json and safetensors.
        output: the folder to create.
        model_format: "gpt2" or "gpt2_scratch".
        dtype: cast the weights; None keeps their dtype.

    Returns:
        A sentence that says what was written.

    Raises:
        InputError: `model` is not a complete GPT-2 that is implemented here, or `output` exists or cannot be written.
    """
    if "\0" in str(output):
        raise InputError(f"--output {str(output)!r} contains a NUL character; choose another name")
    if output.exists() or output.is_symlink():
        raise InputError(f"--output {output} exists; choose another name")
    source = _find_source(model)
    config_dict, skeleton = read_config(source)
    files = check_weights(source, skeleton)

    # In the nearest folder that exists: a failed export creates no parents.
    partial = next(parent for parent in output.parents if parent.exists()) / f".unfinished-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write_weights(source, partial, files, dtype)
        write_config(partial, config_dict, type(skeleton), model_format, dtype)
        copy_other_files(source, partial, model_format)
        if model_format == "gpt2_scratch":
            custom_object_save(skeleton, partial)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error}; choose another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    name = _OFFICIAL_NAMES[type(skeleton)] if model_format == "gpt2" else type(skeleton).__name__
    return f"wrote {output}: model_type {model_format}, {name}, {skeleton.num_parameters():,} parameters"


def _find_source(model: str) -> Path:
    """Return the model's folder, after downloading it if `model` is a Hub repository."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=[*_COPIED, "*.safetensors"], ignore_patterns=["*/*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            f"--model {model!r} is neither a folder nor a repository on the Hub: {one_line(error)}"
        ) from error


def read_config(source: Path) -> tuple[dict[str, Any], GPT2ScratchPreTrainedModel]:
    """Return the content of config.json, and the model that it describes, on the meta device.

    Raises:
        InputError: there is no valid config.json, or it is not that of a GPT-2 that is implemented here.
    """
    path = source / "config.json"
    try:
        config_dict = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; check --model") from error
    model_type = config_dict.get("model_type") if isinstance(config_dict, dict) else None
    if model_type not in FORMATS:
        raise InputError(f"{path} has model_type {model_type!r}; expected gpt2 or gpt2_scratch")
    if config_dict.get("quantization_config"):
        raise InputError(f"{path} has a quantization_config; dequantize the model and save it first")
    # The attention implementation that the file names may not be installed here.
    values = {key: value for key, value in config_dict.items() if key.lstrip("_") != "attn_implementation"}
    try:
        config = GPT2ScratchConfig.from_dict(values | {"attn_implementation": "eager"})
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{path} describes an unsupported model: {one_line(error)}") from error
    architecture = str((config_dict.get("architectures") or ["GPT2LMHeadModel"])[0])
    if architecture not in _CLASSES:
        raise InputError(
            f"{path} names the architecture {architecture}; supported are {', '.join(_CLASSES)}: load the model with "
            "one of these classes and save it"
        )
    with torch.device("meta"):
        return config_dict, _CLASSES[architecture](config)


def check_weights(source: Path, skeleton: GPT2ScratchPreTrainedModel) -> list[str]:
    """Return the names of the weight files, after checking by their headers that they fill the model exactly.

    Raises:
        InputError: a weight is missing, unexpected, duplicate, quantized or of the wrong shape.
    """
    files = _weight_files(source)
    expected = {_bare(name): tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for name, dtype, shape in _headers(source, files):
        if _bare(name) in found:
            raise InputError(f"{source} contains {name} twice; save the model again")
        if dtype not in _FLOATING:
            raise InputError(f"{name} in {source} has dtype {dtype}; dequantize the model and save it first")
        found[_bare(name)] = shape
    optional = {"lm_head.weight"} if skeleton.config.tie_word_embeddings else set()
    for problem, names in (("lacks", set(expected) - set(found) - optional), ("adds", set(found) - set(expected))):
        if names:
            raise InputError(
                f"{source} {problem} {', '.join(sorted(names)[:3])} ({len(names)} in total), compared with a "
                f"{type(skeleton).__name__} of its config.json; save the complete model, and nothing else"
            )
    for name, shape in sorted(found.items()):
        if shape != expected[name]:
            raise InputError(
                f"{name} in {source} has shape {shape} instead of {expected[name]}; use the config.json that belongs "
                "to these weights"
            )
    return files


def _weight_files(source: Path) -> list[str]:
    """Return the names of the safetensors files: one, or the shards of an index."""
    if (source / _WEIGHTS).is_file():
        return [_WEIGHTS]
    index = source / _INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in source.glob("pytorch_model*.bin"))
        advice = (
            "if you trust it, load the model with use_safetensors=False and save it" if pickles else "check --model"
        )
        raise InputError(f"no {_WEIGHTS} in {source}, only {', '.join(pickles) or 'other files'}; {advice}")
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} has no valid weight_map ({error!r}); check --model") from error
    for name in files:
        if Path(str(name)).name != name or not (source / name).is_file():
            raise InputError(f"{index} lists the shard {name}, which is missing; download the model again")
    return files


def _headers(source: Path, files: Sequence[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of every weight, without the causal masks of old checkpoints."""
    for file in files:
        try:
            with safe_open(source / file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    if not name.endswith((".attn.bias", ".attn.masked_bias")):
                        weight = weights.get_slice(name)
                        yield name, weight.get_dtype(), tuple(weight.get_shape())
        except SafetensorError as error:
            raise InputError(f"{source / file} is corrupted ({error}); download or save it again") from error


def _bare(name: str) -> str:
    """Return a weight's name without the prefix of the base model, which old official checkpoints lack."""
    return name.removeprefix("transformer.")


def write_weights(source: Path, target: Path, files: Sequence[str], dtype: torch.dtype | None) -> None:
    """Copy the weights, or cast them one file at a time."""
    total_size = 0
    for file in files:
        if dtype is None:
            shutil.copyfile(source / file, target / file)
            continue
        with safe_open(source / file, framework="pt") as weights:
            cast = {name: _cast(name, weights.get_tensor(name), dtype) for name in weights.keys()}  # noqa: SIM118
            metadata = weights.metadata() or {"format": "pt"}
        total_size += sum(tensor.nbytes for tensor in cast.values())
        save_file(cast, target / file, metadata=metadata)
    if files != [_WEIGHTS]:
        index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        if dtype is not None:
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": total_size}
        _write_json(target / _INDEX, index)


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`; causal masks of old checkpoints, which are integers, stay as they are."""
    if not weight.is_floating_point():
        return weight
    cast = weight.to(dtype)
    if not torch.equal(cast.isfinite(), weight.isfinite()):
        raise InputError(f"{name} holds {weight.abs().max():.3g}, too large for {dtype}; use --dtype bfloat16")
    return cast


def write_config(
    target: Path,
    config_dict: dict[str, Any],
    model_class: type[GPT2ScratchPreTrainedModel],
    model_format: str,
    dtype: torch.dtype | None,
) -> None:
    """Write config.json with another model type, class, code location, context size and dtype; other keys stay."""
    config_dict = {key: value for key, value in config_dict.items() if key not in ("auto_map", "n_ctx")}
    config_dict["model_type"] = model_format
    if model_format == "gpt2":
        config_dict["architectures"] = [_OFFICIAL_NAMES[model_class]]
        config_dict["n_ctx"] = config_dict.get("n_positions", 1024)  # llama.cpp and others read this name
    else:
        config_dict["architectures"] = [model_class.__name__]
        config_dict["auto_map"] = AUTO_MAP
    if dtype is not None:
        config_dict.pop("torch_dtype", None)
        config_dict["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(target / "config.json", config_dict)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does, so that a round trip returns the same bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_other_files(source: Path, target: Path, model_format: str) -> None:
    """Copy tokenizer, generation config and model card.

    In format gpt2, the card no longer asks to trust our code, and the tokenizer's class is one that all versions know.
    """
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    if model_format == "gpt2":
        _name_tokenizer_class(target)
    card = target / "README.md"
    if model_format == "gpt2" and card.exists():
        lines = card.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        kept = [line for line in lines if "`import gpt2_scratch`" not in line and line.strip() != "- gpt2_scratch"]
        text = "".join(kept).replace(", trust_remote_code=True", "")
        card.write_text(text, encoding="utf-8", errors="surrogateescape")


def _name_tokenizer_class(folder: Path) -> None:
    """Replace a general tokenizer class, under which transformers 4 returns token_type_ids, or which it does not know.

    GPT-2 adds embeddings of token_type_ids, so the logits would be wrong. `GPT2Tokenizer` gives the same ids and
    offsets in transformers 4, 5 and transformers.js, if the tokenizer is of GPT-2's kind.
    """
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        is_gpt2 = is_gpt2_tokenizer(tokenizer)
    except (OSError, ValueError, AttributeError, TypeError):
        return  # not a tokenizer of transformers; it is copied as it is
    config["tokenizer_class"] = "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def is_gpt2_tokenizer(tokenizer: dict[str, Any]) -> bool:
    """Return whether the content of a tokenizer.json is a byte-level BPE with GPT-2's pre-tokenization."""
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    post_processor = tokenizer.get("post_processor") or {}
    return (
        tokenizer["model"].get("type") == "BPE"
        and not tokenizer.get("normalizer")
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
        and not post_processor.get("special_tokens")  # adds no tokens to the text
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(prog="python -m gpt2_scratch.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a repository on the Hub")
    parser.add_argument("--output", required=True, type=Path, help="the folder to create")
    parser.add_argument("--format", required=True, choices=FORMATS, help="gpt2 loads without our code")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep their dtype)")
    options = parser.parse_args(arguments)
    print(export(options.model, options.output, options.format, DTYPES.get(options.dtype)))


if __name__ == "__main__":
    run_command(main)
