"""A model folder in the other of our two worlds: native `gpt2`, or `gpt2_scratch` with its own code.

    python -m gpt2_scratch.export --model runs/quickstart/model --output my-gpt2 --format gpt2
    python -m gpt2_scratch.export --model openai-community/gpt2 --output gpt2-ours --format gpt2_scratch

Names and layouts of the weights are the same in both, so their files are copied as they are and a round trip returns
every byte; what changes is config.json and the code beside it. Only `--dtype` rewrites weights. No model is built in
memory: the weights are checked by the headers of their files, and cast one at a time.
"""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from common.cli_errors import CommandParser, InputError, run_command

from . import GPT2ScratchForCausalLM, GPT2ScratchForSequenceClassification, GPT2ScratchModel
from .configuration_gpt2_scratch import AUTO_MAP, GPT2ScratchConfig
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel

FORMATS = ("gpt2", "gpt2_scratch")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_OFFICIAL_NAMES: dict[type[GPT2ScratchPreTrainedModel], str] = {
    GPT2ScratchForCausalLM: "GPT2LMHeadModel",
    GPT2ScratchForSequenceClassification: "GPT2ForSequenceClassification",
    GPT2ScratchModel: "GPT2Model",
}
_FLOATING = ("BF16", "F16", "F32", "F64")  # as safetensors calls them
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Tokenizer, generation config, card and its pictures; not weights of other frameworks, nor an optimizer's state.
_CARRIED = ("*.json", "*.txt", "*.jinja", "*.md", "*.png", "LICENSE*")
_NOT_CARRIED = {"config.json", _INDEX, "pytorch_model.bin.index.json"}


def export(model: str, output: Path, model_format: str, dtype: torch.dtype | None = None) -> str:
    """Write the model of a folder or Hub id as another folder, which appears only when it is whole.

    Arguments:
        model: a folder or Hub id with config.json and safetensors, of either format.
        output: a folder that does not exist yet.
        model_format: "gpt2" or "gpt2_scratch".
        dtype: the dtype of the new weights, the old one when None.

    Returns:
        A sentence on what was written.

    Raises:
        InputError: when `model` is no GPT-2 that we implement, or not a whole one, or `output` exists.
    """
    if "\0" in str(output):
        raise InputError(f"expected --output to be a path, found {str(output)!r} with a NUL in it; choose another name")
    if output.exists() or output.is_symlink():
        raise InputError(f"expected --output to be a new folder, found that {output} exists; choose another name")
    source = find_source(model)
    config_dict, model_class = read_config(source)
    files = weight_files(source)
    with torch.device("meta"):
        # The attention that config.json asks for need not be installed here.
        skeleton = model_class(GPT2ScratchConfig.from_dict(_without_attention(config_dict)))
    check_weights(source, files, skeleton)

    unfinished = output.with_name(f".unfinished-{output.name}")
    new_parents = [parent for parent in output.parents if not parent.exists()]  # innermost first
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_weights(source, unfinished, files, dtype)
        write_config(unfinished, config_dict, model_class, model_format, dtype)
        carry_other_files(source, unfinished, model_format)
        if model_format == "gpt2_scratch":
            custom_object_save(skeleton, unfinished)
        unfinished.rename(output)
    except OSError as error:
        raise InputError(f"expected to write {output}, found {error}; choose another --output") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in [] if output.exists() else new_parents:
            with contextlib.suppress(OSError):  # never made, or no longer empty
                parent.rmdir()
    name = _OFFICIAL_NAMES[model_class] if model_format == "gpt2" else model_class.__name__
    return f"wrote {output}: model_type {model_format}, {name}, {skeleton.num_parameters():,} parameters"


def find_source(model: str) -> Path:
    """Return the folder of a model, downloaded when `model` is a Hub id."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=[*_CARRIED, "*.safetensors"], ignore_patterns=["*/*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"expected --model to be a folder or Hub id, found {model!r}: {reason}") from error


def read_config(source: Path) -> tuple[dict[str, Any], type[GPT2ScratchPreTrainedModel]]:
    """Return what config.json says, and the class of ours that it describes.

    Raises:
        InputError: when there is none, or not that of a GPT-2 that we implement.
    """
    path = source / "config.json"
    try:
        config_dict = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"expected a model folder, found no config.json in {source}; check --model") from None
    except OSError as error:
        raise InputError(f"expected to read {path}, found {error}; check --model") from error
    except ValueError as error:
        raise InputError(f"expected JSON in {path}, found {error}; check --model") from error
    model_type = config_dict.get("model_type") if isinstance(config_dict, dict) else None
    if model_type not in FORMATS:
        raise InputError(f"expected model_type gpt2 or gpt2_scratch in {path}, found {model_type!r}; check --model")
    if config_dict.get("quantization_config"):
        raise InputError(
            f"expected weights as they were trained, found a quantization_config in {path}; dequantize the model, "
            "and save that"
        )
    try:
        GPT2ScratchConfig.from_dict(_without_attention(config_dict))
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"expected a GPT-2 as we implement it in {path}: {' '.join(str(error).split())}") from error

    classes = {name: ours for ours, official in _OFFICIAL_NAMES.items() for name in (official, ours.__name__)}
    architectures = config_dict.get("architectures") or ["GPT2LMHeadModel"]
    if not isinstance(architectures, list) or architectures[0] not in list(classes):
        found = architectures[0] if isinstance(architectures, list) else repr(architectures)
        raise InputError(
            f"expected one of {', '.join(classes)} as architecture in {path}, found {found}; "
            "load it with the class you want, and save that"
        )
    return config_dict, classes[architectures[0]]


def _without_attention(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the attention that needs no package."""
    config_dict = {key: value for key, value in config_dict.items() if key.lstrip("_") != "attn_implementation"}
    return config_dict | {"attn_implementation": "eager"}


def weight_files(source: Path) -> list[str]:
    """Return the names of the safetensors files, one or several when sharded."""
    if (source / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if (source / _INDEX).is_file():
        try:
            files = sorted(set(json.loads((source / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"expected a weight_map in {source / _INDEX}, found {error!r}; check --model") from error
        for name in files:
            if not isinstance(name, str) or Path(name).name != name or not (source / name).is_file():
                raise InputError(f"expected the shard {name} beside {source / _INDEX}, found none; download it again")
        return files
    found = sorted(path.name for path in source.glob("pytorch_model*.bin"))
    hint = "; load the model with use_safetensors=False and save it, if you trust it" if found else "; check --model"
    raise InputError(f"expected {_WEIGHTS} in {source}, found {', '.join(found) or 'no weights'}{hint}")


def check_weights(source: Path, files: Sequence[str], skeleton: GPT2ScratchPreTrainedModel) -> None:
    """Refuse weights that would not fill the model exactly; only headers are read.

    Arguments:
        source: the folder of the files.
        files: their names.
        skeleton: the model on the meta device.
    """
    expected = {_bare(name): tuple(weight.shape) for name, weight in skeleton.state_dict().items()}
    required = set(expected)
    if skeleton.config.tie_word_embeddings:
        required.discard("lm_head.weight")
    found: dict[str, tuple[int, ...]] = {}
    repeated: list[str] = []
    other_types: list[str] = []
    for name in files:
        try:
            with safe_open(source / name, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    if key.endswith((".attn.bias", ".attn.masked_bias")):
                        continue  # a causal mask
                    weight = weights.get_slice(key)
                    repeated += [key] if _bare(key) in found else []
                    other_types += [f"{weight.get_dtype()} in {key}"] if weight.get_dtype() not in _FLOATING else []
                    found[_bare(key)] = tuple(weight.get_shape())
        except SafetensorError as error:
            raise InputError(
                f"expected safetensors in {source / name}, found {error}; download or save it again"
            ) from error
    if repeated:
        raise InputError(f"expected every weight once in {source}, found {repeated[0]} twice; save the model again")
    if other_types:
        raise InputError(
            f"expected {', '.join(_FLOATING)} in {source}, found {other_types[0]}; dequantize the model, and save that"
        )
    for problem, keys in (("without", sorted(required - set(found))), ("with", sorted(set(found) - set(expected)))):
        if keys:
            raise InputError(
                f"expected the weights of a {type(skeleton).__name__} in {source}, found them {problem} "
                f"{', '.join(keys[:3])} ({len(keys)} such weights); save the whole model, and nothing else"
            )
    for key, shape in sorted(found.items()):
        if shape != expected[key]:
            raise InputError(
                f"expected {key} of shape {expected[key]} by config.json, found {shape} in {source}; "
                "take the config that belongs to these weights"
            )


def _bare(name: str) -> str:
    """A weight's name in the older spelling of the official checkpoints, that of the base model alone."""
    return name.removeprefix("transformer.")


def write_weights(source: Path, target: Path, files: Sequence[str], dtype: torch.dtype | None) -> None:
    """Copy the weights, or cast them one file at a time."""
    total_size = 0
    for name in files:
        if dtype is None:
            shutil.copyfile(source / name, target / name)
            continue
        with safe_open(source / name, framework="pt") as weights:
            cast = {key: _cast(key, weights.get_tensor(key), dtype) for key in weights.keys()}  # noqa: SIM118
            metadata = weights.metadata() or {"format": "pt"}
        total_size += sum(tensor.nbytes for tensor in cast.values())
        save_file(cast, target / name, metadata=metadata)
    if files != [_WEIGHTS]:
        index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        if dtype is not None:
            metadata = index.get("metadata")
            index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_size}
        _write_json(target / _INDEX, index)


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in `dtype`; the causal masks of old checkpoints may be of integers, and stay."""
    if not weight.is_floating_point():
        return weight
    cast = weight.to(dtype)
    if not torch.equal(cast.isfinite(), weight.isfinite()):
        raise InputError(
            f"expected numbers that {dtype} can hold, found {weight.abs().max():.3g} in {name}; use --dtype bfloat16"
        )
    return cast


def write_config(
    target: Path,
    config_dict: dict[str, Any],
    model_class: type[GPT2ScratchPreTrainedModel],
    model_format: str,
    dtype: torch.dtype | None,
) -> None:
    """Write config.json: all that it said before, but for the type, the class, and where its code is."""
    config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
    config_dict["model_type"] = model_format
    if model_format == "gpt2":
        config_dict["architectures"] = [_OFFICIAL_NAMES[model_class]]
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


def carry_other_files(source: Path, target: Path, model_format: str) -> None:
    """Copy tokenizer, generation config and card; the card of a native folder no longer asks for trust in code."""
    for path in sorted({path for pattern in _CARRIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in _NOT_CARRIED:
            shutil.copyfile(path, target / path.name)
    card = target / "README.md"
    if model_format == "gpt2" and card.exists():
        lines = card.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        kept = [line for line in lines if "`import gpt2_scratch`" not in line and line.strip() != "- gpt2_scratch"]
        text = "".join(kept).replace(", trust_remote_code=True", "")
        card.write_text(text, encoding="utf-8", errors="surrogateescape")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    parser = CommandParser(prog="python -m gpt2_scratch.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a Hub id")
    parser.add_argument("--output", required=True, type=Path, help="the new folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="gpt2 loads without our code")
    parser.add_argument("--dtype", choices=DTYPES, help="of the new weights; the old one when not given")
    options = parser.parse_args(arguments)
    print(export(options.model, options.output, options.format, DTYPES.get(options.dtype)))


if __name__ == "__main__":
    run_command(main)
