"""A model folder that is exported: its config, its weights and its tokenizer, checked.

No model is built in memory: weights are checked by the headers of their files.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from common.cli_errors import InputError, one_line
from common.hub_retry import network_errors
from common.json_files import read_json_object
from common.tokenizer_json import adds_special_tokens

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .heads_gpt2_scratch import (
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchForTokenClassification,
)
from .modeling_gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchModel
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel

# What transformers raises for an unusable config, weight file or tokenizer.
LOADING_ERRORS: tuple[type[BaseException], ...] = (
    *network_errors(),
    *(OSError, EOFError, ValueError, LookupError, RuntimeError, AttributeError, ImportError, TypeError),
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Tokenizer, generation config, model card and its images. Not weights of other frameworks, nor optimizer state.
COPIED = ("*.json", "*.txt", "*.jinja", "*.md", "*.png", "LICENSE*")
OFFICIAL_NAMES: dict[type[GPT2ScratchPreTrainedModel], str] = {
    GPT2ScratchForCausalLM: "GPT2LMHeadModel",
    GPT2ScratchForSequenceClassification: "GPT2ForSequenceClassification",
    GPT2ScratchForTokenClassification: "GPT2ForTokenClassification",
    GPT2ScratchForQuestionAnswering: "GPT2ForQuestionAnswering",
    GPT2ScratchModel: "GPT2Model",
}
_CLASSES = {name: ours for ours, official in OFFICIAL_NAMES.items() for name in (official, ours.__name__)}
_FLOATING = ("BF16", "F16", "F32", "F64")  # names of safetensors
_MODEL_TYPES = ("gpt2", "gpt2_scratch")


def model_in_run(model_id: str) -> str:
    """Return the finished model of a run's folder, or its newest checkpoint; any other `model_id` unchanged."""
    run = Path(model_id)
    if (run / "config.json").exists() or not (run / "recipe.yaml").is_file():
        return model_id
    steps = [path for path in run.glob("checkpoints/step-*/config.json") if path.parent.name[5:].isdecimal()]
    steps.sort(key=lambda path: int(path.parent.name[5:]))
    found = [path.parent for path in (*steps, run / "model" / "config.json") if path.is_file()]
    if not found:
        raise InputError(f"the run {model_id!r} has no checkpoint yet; wait for its first")
    return str(found[-1])


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be that of a folder or file, not of a repository on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_source(model: str) -> Path:
    """Return the model's folder, after downloading it if `model` is a Hub repository."""
    if Path(model).is_dir():
        return Path(model)
    if looks_like_path(model):
        raise InputError(f"there is no folder or file {model!r}; check --model")
    try:
        return Path(snapshot_download(model, allow_patterns=[*COPIED, "*.safetensors"], ignore_patterns=["*/*"]))
    except LOADING_ERRORS as error:
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
        config_dict = read_json_object(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; check --model") from error
    model_type = config_dict.get("model_type")
    if model_type not in _MODEL_TYPES:
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
    files = weight_files(source)
    found: dict[str, tuple[int, ...]] = {}
    for name, dtype, shape in weight_headers(source, files):
        if bare_name(name) in found:
            raise InputError(f"{source} contains {name} twice; save the model again")
        if dtype not in _FLOATING:
            raise InputError(f"{name} in {source} has dtype {dtype}; dequantize the model and save it first")
        found[bare_name(name)] = shape
    compare_weights(source, found, skeleton)
    return files


def compare_weights(source: Path, found: Mapping[str, tuple[int, ...]], skeleton: GPT2ScratchPreTrainedModel) -> None:
    """Raise an `InputError` unless the shapes of the weights in `source`, by bare name, are those of the model."""
    expected = {bare_name(name): tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    optional = {"lm_head.weight"} if skeleton.config.tie_word_embeddings else set()
    for problem, names in (("lacks", set(expected) - set(found) - optional), ("adds", set(found) - set(expected))):
        if names:
            raise InputError(
                f"{source} {problem} {', '.join(sorted(names)[:3])} ({len(names)} in total), compared with a "
                f"{type(skeleton).__name__} of its config; save the complete model, and nothing else"
            )
    for name, shape in sorted(found.items()):
        if shape != expected[name]:
            raise InputError(
                f"{name} in {source} has shape {shape} instead of {expected[name]}; use the config.json that belongs "
                "to these weights"
            )


def weight_files(source: Path) -> list[str]:
    """Return the names of the safetensors files: one, or the shards of an index."""
    if (source / WEIGHTS).is_file():
        return [WEIGHTS]
    index = source / INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in source.glob("pytorch_model*.bin"))
        advice = (
            "if you trust it, load the model with use_safetensors=False and save it" if pickles else "check --model"
        )
        raise InputError(f"no {WEIGHTS} in {source}, only {', '.join(pickles) or 'other files'}; {advice}")
    try:
        files = sorted(set(read_json_object(index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} has no valid weight_map ({error!r:.120}); download the model again") from error
    if not files:
        raise InputError(f"{index} lists no files; download the model again")
    present = {path.name for path in source.iterdir() if path.is_file()}
    for name in files:
        if name not in present:
            raise InputError(f"{index} lists the shard {name!r:.120}, which is missing; download the model again")
    return files


def check_index(model: str | Path) -> None:
    """Raise an `InputError` if `model` is a folder whose index of weight files is corrupted, or names files elsewhere.

    transformers would load a file of another folder, or raise a bare IndexError. An `OSError` says which file of
    weights may not be read.
    """
    folder = Path(model)
    for weights in folder.glob("*.safetensors"):
        _check_readable(weights)
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        weight_files(folder)


def weight_headers(source: Path, files: Sequence[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield name, dtype and shape of every weight, without the causal masks of old checkpoints."""
    for file in files:
        _check_readable(source / file)
        try:
            with safe_open(source / file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    if not name.endswith((".attn.bias", ".attn.masked_bias")):
                        weight = weights.get_slice(name)
                        yield name, weight.get_dtype(), tuple(weight.get_shape())
        except SafetensorError as error:
            raise InputError(f"{source / file} is corrupted ({error}); download or save it again") from error


def _check_readable(weights: Path) -> None:
    """Raise the operating system's error; safetensors calls every file missing that it cannot open."""
    weights.open("rb").close()


def bare_name(name: str) -> str:
    """Return a weight's name without the prefix of the base model, which old official checkpoints lack."""
    return name.removeprefix("transformer.")


def is_gpt2_tokenizer(tokenizer: dict[str, Any]) -> bool:
    """Return whether the content of a tokenizer.json is a byte-level BPE with GPT-2's pre-tokenization."""
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    return (
        tokenizer["model"].get("type") == "BPE"
        and not tokenizer.get("normalizer")
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
        and not adds_special_tokens(tokenizer.get("post_processor"))
    )
