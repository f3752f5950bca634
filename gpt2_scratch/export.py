"""Exports a model: to `gpt2`, which transformers loads without our code, to `gpt2_scratch`, or to GGUF.

    python -m gpt2_scratch.export --model runs/quickstart/model --output my-gpt2 --format gpt2
    python -m gpt2_scratch.export --model openai-community/gpt2 --output gpt2-ours --format gpt2_scratch
    python -m gpt2_scratch.export --model runs/quickstart/model --output my-gpt2.gguf --format gguf --dtype q8_0
    python -m gpt2_scratch.export --model out/ckpt.pt --output my-nanogpt --format gpt2_scratch

The two folder formats have the same weight names and layouts. Weight files are copied, so a round trip returns every
byte; only config.json, the card, the code and the name of the tokenizer's class change. `--dtype` casts the weights,
one file at a time. A checkpoint of nanoGPT, build-nanogpt, llm.c or OpenAI's TensorFlow code becomes a model folder
first.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save

from common.cli_errors import CommandParser, InputError, advice_on, os_error_message, run_command
from common.json_files import read_json_object

from .configuration_gpt2_scratch import AUTO_MAP
from .foreign_checkpoints import convert, is_foreign
from .gguf_file import GGUF_DTYPES, write_gguf
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel
from .source_folder import (
    COPIED,
    INDEX,
    OFFICIAL_NAMES,
    WEIGHTS,
    check_weights,
    find_source,
    is_gpt2_tokenizer,
    model_in_run,
    read_config,
)

FORMATS = ("gpt2", "gpt2_scratch", "gguf")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# In lines of a model card.
_ABOUT_OUR_CODE = (
    "`import gpt2_scratch`",
    "`python -m gpt2_scratch.export",
    "but not this code load the same weights",
    "- gpt2_scratch\n",
)
_NOT_COPIED = {"config.json", INDEX, "pytorch_model.bin.index.json"}


def export(model: str, output: Path, model_format: str, dtype: str | None = None, tokenizer: str | None = None) -> str:
    """Write a model to a new folder or file, which appears only when it is complete; return a sentence about it.

    Args:
        model: a folder, run or Hub repository of either folder format, or a checkpoint of another program.
        output: the folder to create; with "gguf", the file.
        model_format: one of `FORMATS`.
        dtype: cast the weights to one of `DTYPES`, or with "gguf" to one of `GGUF_DTYPES`; None keeps their dtype.
        tokenizer: of a checkpoint of another program; see `foreign_checkpoints.convert`.

    Raises:
        InputError: `model` is not a complete GPT-2 that is implemented here or that the format can hold, or `output`
            exists or cannot be written.
    """
    is_gguf = model_format == "gguf"
    dtypes = GGUF_DTYPES if is_gguf else tuple(DTYPES)
    if dtype not in (None, *dtypes):
        raise InputError(f"--format {model_format} does not support --dtype {dtype}; choose from {', '.join(dtypes)}")
    if is_gguf and output.suffix != ".gguf":
        raise InputError(f"--output {output} must be a name that ends in .gguf, because --format gguf writes one file")
    if "\0" in str(output):
        raise InputError(f"--output {str(output)!r} contains a NUL character; choose another name")
    if output.exists() or output.is_symlink():
        raise InputError(f"--output {output} exists; choose another name")
    is_of_another_program = is_foreign(Path(model))
    if tokenizer is not None and not is_of_another_program:
        raise InputError("--tokenizer is for checkpoints of other programs; a model folder has its own tokenizer")
    if not is_of_another_program:
        source = find_source(model_in_run(model))

    # In the nearest folder that exists: a failed export creates no parents.
    partial = next(parent for parent in output.parents if parent.exists()) / f".unfinished-{output.name}"
    shutil.rmtree(partial, ignore_errors=True)
    details = ""
    try:
        partial.mkdir()
        if is_of_another_program:
            source = partial / f"{output.name}.source"
            source.mkdir()
            details = f", {convert(Path(model), source, tokenizer)}"
        config_dict, skeleton = read_config(source)
        files = check_weights(source, skeleton)
        written = partial / output.name
        if is_gguf:
            details += f", {write_gguf(source, files, skeleton, written, output.stem, dtype)}"
        else:
            written.mkdir()
            write_weights(source, written, files, DTYPES.get(dtype or ""))
            write_config(written, config_dict, type(skeleton), model_format, DTYPES.get(dtype or ""))
            copy_other_files(source, written, model_format)
            if model_format == "gpt2_scratch":
                custom_object_save(skeleton, written)
        output.parent.mkdir(parents=True, exist_ok=True)
        written.rename(output)
    except OSError as error:
        of_source = error.filename2 is None and not Path(error.filename or partial).is_relative_to(partial)
        if of_source and (message := os_error_message(error)):
            raise InputError(message) from error
        advice = advice_on(error) or "choose another --output"
        raise InputError(f"cannot write {output}: {error.strerror or error}; {advice}") from error
    except SafetensorError as error:  # its error for a full disk
        raise InputError(f"cannot write {output}: {error}; free some space, and run the command again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    name = type(skeleton).__name__ if model_format == "gpt2_scratch" else OFFICIAL_NAMES[type(skeleton)]
    kind = "GGUF" if is_gguf else f"model_type {model_format}"
    return f"wrote {output}: {kind}, {name}, {skeleton.num_parameters():,} parameters{details}"


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
    if files != [WEIGHTS]:
        index = read_json_object(source / INDEX)
        if dtype is not None:
            metadata = index.get("metadata")
            index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total_size}
        _write_json(target / INDEX, index)


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
    if model_format == "gpt2":
        n_ctx = config_dict.get("n_positions", 1024)  # llama.cpp and others read this name
        changes = {"architectures": [OFFICIAL_NAMES[model_class]], "n_ctx": n_ctx}
    else:
        changes = {"architectures": [model_class.__name__], "auto_map": AUTO_MAP}
    config_dict |= {"model_type": model_format, **changes}
    if dtype is not None:
        config_dict.pop("torch_dtype", None)
        config_dict["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(target / "config.json", config_dict)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does, so that a round trip returns the same bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_other_files(source: Path, target: Path, model_format: str) -> None:
    """Copy tokenizer, generation config and model card; in format gpt2, as other programs and versions read them."""
    for path in {path for pattern in COPIED for path in source.glob(pattern)}:
        if path.is_file() and path.name not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
    if model_format != "gpt2":
        return
    _name_tokenizer_class(target)
    card = target / "README.md"
    if card.exists():
        text = native_card(card.read_text(encoding="utf-8", errors="surrogateescape"))
        card.write_text(text, encoding="utf-8", errors="surrogateescape")


def native_card(card: str) -> str:
    """Return the card without what it says about our code.

    Its examples load the folder: the repository that a downloaded card names has our form.
    """
    kept: list[str] = []
    removed = False
    for line in card.splitlines(keepends=True):
        if any(part in line for part in _ABOUT_OUR_CODE):
            removed = True
        elif line.strip() or not removed or (kept and kept[-1].strip()):  # no second blank line around what is removed
            kept.append(line)
            removed = removed and not line.strip()
    text = re.sub(r'(?<=[( ])"[^"\n]*", trust_remote_code=True', '"path/to/this/folder"', "".join(kept))
    return text.replace(", trust_remote_code=True", "")


def _name_tokenizer_class(folder: Path) -> None:
    """Replace a general tokenizer class, under which transformers 4 returns token_type_ids, or which it does not know.

    GPT-2 adds embeddings of token_type_ids, so the logits would be wrong. `GPT2Tokenizer` gives the same ids and
    offsets in transformers 4, 5 and transformers.js, if the tokenizer is of GPT-2's kind.
    """
    path = folder / "tokenizer_config.json"
    try:
        config = read_json_object(path)
        if config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return
        is_gpt2 = is_gpt2_tokenizer(read_json_object(folder / "tokenizer.json"))
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return  # not a tokenizer of transformers; it is copied as it is
    config["tokenizer_class"] = "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast"
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = CommandParser(prog="python -m gpt2_scratch.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, run, Hub repository or checkpoint file")
    parser.add_argument("--output", required=True, type=Path, help="the folder to create; with gguf, the file")
    parser.add_argument(
        "--format", required=True, choices=FORMATS, help="gpt2 loads without our code; gguf is for llama.cpp"
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, *GGUF_DTYPES),
        help=f"cast the weights (default: keep their dtype); {', '.join(GGUF_DTYPES)} with gguf",
    )
    parser.add_argument(
        "--tokenizer",
        help="for another program's checkpoint: gpt2 (default if the vocabulary has its size), folder, Hub id or none",
    )
    options = parser.parse_args(arguments)
    print(export(options.model, options.output, options.format, options.dtype, options.tokenizer))


if __name__ == "__main__":
    run_command(main)
