"""Checkpoints of nanoGPT, build-nanogpt, llm.c and OpenAI's TensorFlow code, converted to a model folder of ours.

These programs compute GPT-2, so only names, layouts and paddings differ. Nothing in a file is executed: pickles are
read with `weights_only`, and a config object in them becomes an object that only holds its fields. The weights are
held in memory once.
"""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken.load
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2Tokenizer

from common.cli_errors import InputError, one_line
from common.json_files import read_json_object

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .modeling_gpt2_scratch import GPT2ScratchForCausalLM
from .source_folder import LOADING_ERRORS, WEIGHTS, bare_name, compare_weights, looks_like_path
from .tensorflow_checkpoint import read_tensors

_HPARAMS = "hparams.json"
_TENSORFLOW_NAME = re.compile(r"model/(?:h(\d+)/)?((?:attn/|mlp/)?\w+)(?:/([gwb]))?")
_LLMC_MAGIC = 20240326
_LLMC_DTYPES = {3: ("<f4", torch.float32), 5: ("<i2", torch.bfloat16)}  # by version; NumPy has no bfloat16
_LLMC_HEADER = 256  # int32
_LLMC_LAYERS = 1000  # more are not the number of a model

_GPT2_SIZES = (50257, 50304)  # of GPT-2's vocabulary, as it is and padded
_PADDED_TO = (64, 128)
_ENCODINGS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_END_OF_TEXT = "<|endoftext|>"


class _Checkpoint(NamedTuple):
    """A checkpoint: weights with official names and layouts, and settings that their shapes do not show."""

    program: str
    weights: dict[str, Tensor]
    n_head: int
    activation_function: str
    dropout: float = 0.0


class _Fields:
    """Stands for a config object of another program; unpickling fills its fields and runs no code."""


def is_foreign(path: Path) -> bool:
    """Return whether a path is a file, or a folder like that of OpenAI's TensorFlow release."""
    return path.is_file() or ((path / _HPARAMS).is_file() and not (path / "config.json").exists())


def convert(path: Path, folder: Path, tokenizer: str | None) -> str:
    """Write the model of a checkpoint file to `folder`, with a tokenizer, and return a phrase about it.

    Args:
        path: nanoGPT's or build-nanogpt's `.pt`, llm.c's `.bin`, TensorFlow's `.index`, or the folder of that.
        folder: an existing, empty folder.
        tokenizer: "gpt2", a folder or Hub repository with the model's tokenizer, or "none"; None is GPT-2's, if the
            vocabulary has its size.

    Raises:
        InputError: the file is none of these, is corrupted or another model, or the tokenizer does not fit.
    """
    found = _read(path)
    weights = found.weights
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise InputError(f"{path} has no matrix {name}, so it is not a GPT-2; export supports no other model")
    notes = [f"from {found.program}, activation_function {found.activation_function}"]
    if not any(name.endswith(".bias") for name in weights):
        weights |= {
            name.removesuffix("weight") + "bias": weight.new_zeros(weight.shape[-1])
            for name, weight in weights.items()
            if re.search(r"\.(c_attn|c_proj|c_fc|ln_\w)\.weight$", name)
        }
        notes.append("biases set to 0, because it has none")

    embedding = weights["transformer.wte.weight"]
    loaded = _load_tokenizer(path, len(embedding), tokenizer)
    if loaded is None:
        notes.append("without a tokenizer")
    elif len(loaded) < len(embedding):
        notes.append(f"padding of the vocabulary dropped, {len(embedding):,} to {len(loaded):,} tokens")
        embedding = embedding[: len(loaded)]
    head = weights.pop("lm_head.weight", None)
    tied = head is None or torch.equal(head, weights["transformer.wte.weight"])
    weights["transformer.wte.weight"] = embedding.contiguous()
    if head is not None and not tied:
        weights["lm_head.weight"] = head[: len(embedding)].contiguous()

    config = _config(path, found, None if loaded is None else loaded.eos_token_id, tied)
    with torch.device("meta"):
        skeleton = GPT2ScratchForCausalLM(config)
    compare_weights(path, {bare_name(name): tuple(weight.shape) for name, weight in weights.items()}, skeleton)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    content = {**config.to_diff_dict(), "architectures": [GPT2ScratchForCausalLM.__name__]}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    if loaded is not None:
        loaded.model_max_length = config.n_positions
        loaded.save_pretrained(folder)
    return ", ".join(notes)


def _read(path: Path) -> _Checkpoint:
    if path.is_dir():
        indexes = sorted(path.glob("*.index"))
        if len(indexes) != 1:
            found = ", ".join(each.name for each in indexes) or "none"
            raise InputError(f"{path} must hold one TensorFlow checkpoint (.index), found {found}; pass the file")
        path = indexes[0]
    if path.suffix == ".index":
        return _read_tensorflow(path)
    with path.open("rb") as file:
        start = file.read(8)
    if int.from_bytes(start[:4], "little") == _LLMC_MAGIC:
        return _read_llmc(path)
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(path)
    if path.suffix == ".safetensors":
        raise InputError(f"--model {path} holds weights only; pass the folder that also has their config.json")
    raise InputError(
        f"--model {path} is no checkpoint of nanoGPT or build-nanogpt (.pt), llm.c (.bin) or TensorFlow (.index); pass "
        "such a file, or the folder of a model"
    )


def _read_torch(path: Path) -> _Checkpoint:
    """Return the content of a file that nanoGPT or build-nanogpt wrote with torch.save."""
    unsafe: list[str] = []
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        configs: list[Callable | tuple[Callable, str]] = [(_Fields, name) for name in unsafe if name.endswith("Config")]
        with torch.serialization.safe_globals(configs):
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        others = ", ".join(sorted(name for name in unsafe if not name.endswith("Config"))[:3])
        raise InputError(
            f"{path} holds objects that could run code ({others or one_line(error, 120)}); save it again with tensors "
            'and plain values only: {"model": model.state_dict(), "model_args": {"n_head": …}}'
        ) from error
    except LOADING_ERRORS as error:
        raise InputError(
            f"cannot read {path} as a checkpoint of torch.save ({one_line(error, 120)}); copy or save it again"
        ) from error

    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    state = checkpoint.get("model")
    if not isinstance(state, dict) or not {"model_args", "config"} & set(checkpoint):
        raise InputError(
            f"{path} holds no model of nanoGPT ({{model, model_args}}) or build-nanogpt ({{model, config}}); pass a "
            "folder with config.json for a model of transformers, or save such a dict"
        )
    is_nanogpt = "model_args" in checkpoint
    settings = checkpoint["model_args" if is_nanogpt else "config"]
    settings = settings if isinstance(settings, dict) else getattr(settings, "__dict__", {})
    if "n_head" not in settings:
        raise InputError(f"{path} does not say how many heads the model has; add n_head to its model_args or config")
    weights = {}
    for name, weight in state.items():
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", str(name))
        is_dense = isinstance(weight, Tensor) and weight.layout == torch.strided and not weight.is_meta
        if not is_dense or not weight.is_floating_point() or not weight.dim():
            raise InputError(f"{name} in {path} is not a dense tensor of floats; save the model's own state_dict")
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            weights[name] = _official_layout(name, weight)
    # nanoGPT computes nn.GELU(), build-nanogpt its tanh approximation.
    program, activation = ("nanoGPT", "gelu") if is_nanogpt else ("build-nanogpt", "gelu_pytorch_tanh")
    return _Checkpoint(program, weights, settings["n_head"], activation, settings.get("dropout", 0.0))


def _read_llmc(path: Path) -> _Checkpoint:
    """Return the content of llm.c's model file: a header and all weights of one kind after another, by layer."""
    header = np.fromfile(path, "<i4", _LLMC_HEADER).tolist()
    version, n_positions, vocab_size, n_layer, n_head, n_embd, padded_vocab_size = [*header, *[0] * 8][1:8]
    if version not in _LLMC_DTYPES:
        raise InputError(
            f"{path} is of version {version} of llm.c's format; supported are 3 (fp32) and 5 (bf16), as train_gpt2cu "
            "writes them"
        )
    modules: dict[str, tuple[int, ...]] = {  # the bias has the first size of the weight
        "ln_1": (n_embd,),
        "attn.c_attn": (3 * n_embd, n_embd),
        "attn.c_proj": (n_embd, n_embd),
        "ln_2": (n_embd,),
        "mlp.c_fc": (4 * n_embd, n_embd),
        "mlp.c_proj": (n_embd, 4 * n_embd),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (padded_vocab_size, n_embd),
        "wpe.weight": (n_positions, n_embd),
    }
    for module, shape in modules.items():
        layers = range(min(n_layer, _LLMC_LAYERS))
        shapes |= {f"h.{layer}.{module}.weight": shape for layer in layers}
        shapes |= {f"h.{layer}.{module}.bias": shape[:1] for layer in layers}
    shapes |= {"ln_f.weight": (n_embd,), "ln_f.bias": (n_embd,)}
    stored_as, dtype = _LLMC_DTYPES[version]
    sizes = [int(np.prod(shape, dtype=object)) for shape in shapes.values()]
    expected = 4 * _LLMC_HEADER + sum(sizes) * dtype.itemsize
    if path.stat().st_size != expected or min(vocab_size, *sizes) < 1 or vocab_size > padded_vocab_size:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes, but its header describes {expected:,}; it is truncated or "
            "corrupted: copy or save it again"
        )
    stored = torch.from_numpy(np.memmap(path, stored_as, mode="c", offset=4 * _LLMC_HEADER)).view(dtype)
    weights = {}
    for (name, shape), part in zip(shapes.items(), stored.split(sizes), strict=True):
        weights[f"transformer.{name}"] = _official_layout(name, part.view(shape))
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size]
    return _Checkpoint("llm.c", weights, n_head, "gelu_new")


def _read_tensorflow(index: Path) -> _Checkpoint:
    """Return the content of OpenAI's release, or of a fine-tuned model that keeps its names."""
    weights = {}
    try:
        settings = read_json_object(index.parent / _HPARAMS)
        for name, weight in read_tensors(index):
            parts = _TENSORFLOW_NAME.fullmatch(name)
            if parts:  # the moments of an optimizer have other names
                layer, module, kind = parts.groups()
                block = "" if layer is None else f"h.{layer}."
                official = f"transformer.{block}{module.replace('/', '.')}.{'bias' if kind == 'b' else 'weight'}"
                weights[official] = weight[0] if kind == "w" else weight
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the TensorFlow checkpoint {index}: {one_line(error, 120)}; copy it again, with {_HPARAMS} "
            "and the file .data-00000-of-00001 next to it"
        ) from error
    if "n_head" not in settings:
        raise InputError(f"{index.parent / _HPARAMS} has no n_head; copy it again")
    return _Checkpoint("TensorFlow", weights, settings["n_head"], "gelu_new")


def _official_layout(name: str, weight: Tensor) -> Tensor:
    """Return the weight of an nn.Linear, (out, in), as that of a Conv1D, (in, out); other weights as they are."""
    is_linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) and weight.dim() == 2
    return weight.t().contiguous() if is_linear else weight


def _config(path: Path, found: _Checkpoint, end_of_text_id: int | None, tied: bool) -> GPT2ScratchConfig:
    weights = found.weights
    vocab_size, n_embd = weights["transformer.wte.weight"].shape
    inner = weights.get("transformer.h.0.mlp.c_fc.weight", torch.empty(0)).shape[-1]
    try:
        return GPT2ScratchConfig(
            vocab_size=vocab_size,
            n_positions=weights["transformer.wpe.weight"].shape[0],
            n_embd=n_embd,
            n_layer=len({name.split(".")[2] for name in weights if name.startswith("transformer.h.")}),
            n_head=found.n_head,
            n_inner=None if inner == 4 * n_embd else inner,
            activation_function=found.activation_function,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), found.dropout),
            bos_token_id=end_of_text_id,
            eos_token_id=end_of_text_id,
            tie_word_embeddings=tied,
            dtype=str(weights["transformer.wte.weight"].dtype).removeprefix("torch."),
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{path} describes an unsupported model: {one_line(error)}") from error


def _load_tokenizer(path: Path, vocab_size: int, spec: str | None) -> Any:
    """Return the tokenizer of a vocabulary that may be padded; None for "none"."""
    if spec is None and vocab_size not in _GPT2_SIZES:
        raise InputError(
            f"{path} has a vocabulary of {vocab_size:,} tokens, which is not GPT-2's; pass its tokenizer (a folder or "
            "Hub repository) as --tokenizer, or --tokenizer none to write the weights alone"
        )
    if spec == "none":
        return None
    loaded = _gpt2_tokenizer() if spec in (None, "gpt2") else _saved_tokenizer(str(spec))
    tokens = len(loaded)
    if vocab_size not in (tokens, *(-(-tokens // multiple) * multiple for multiple in _PADDED_TO)):
        raise InputError(
            f"the tokenizer has {tokens:,} tokens, but {path} has a vocabulary of {vocab_size:,}; pass the tokenizer "
            "that the model was trained with as --tokenizer"
        )
    return loaded


def _gpt2_tokenizer() -> GPT2Tokenizer:
    """Return GPT-2's tokenizer from tiktoken's cache, or from where tiktoken downloads it."""
    try:
        files = {
            name: tiktoken.load.read_file_cached(f"{_ENCODINGS}/{name}", sha256) for name, sha256 in _SHA256.items()
        }
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot get GPT-2's vocabulary from tiktoken's cache or the network ({one_line(error, 120)}); connect "
            "once, set TIKTOKEN_CACHE_DIR to a folder where tiktoken has cached it, or pass --tokenizer"
        ) from error
    merges = [tuple(line.split()) for line in files["vocab.bpe"].decode().split("\n")[1:-1]]
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
    return GPT2Tokenizer(vocab=json.loads(files["encoder.json"]), merges=merges, **names)


def _saved_tokenizer(spec: str) -> Any:
    if looks_like_path(spec) and not Path(spec).is_dir():
        raise InputError(f"--tokenizer {spec} is not a folder; pass the folder of a tokenizer, or a Hub repository")
    try:
        return AutoTokenizer.from_pretrained(spec)
    except LOADING_ERRORS as error:
        raise InputError(f"cannot load a tokenizer from --tokenizer {spec}: {one_line(error, 160)}") from error
