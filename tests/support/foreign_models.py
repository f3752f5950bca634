"""Checkpoints as nanoGPT, build-nanogpt, llm.c and TensorFlow write them, and the logits that they compute."""

import dataclasses
import json
import math
import sys
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

N_LAYER, N_HEAD, N_EMBD, BLOCK_SIZE = 2, 2, 16, 24


def state_dict(vocab_size, *, bias=True, masks=False, prefix=""):
    """Return random weights under the names, in the order and in the (out, in) layout of these programs."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    state = {"transformer.wte.weight": normal(vocab_size, N_EMBD), "transformer.wpe.weight": normal(BLOCK_SIZE, N_EMBD)}

    def affine(name, out_features, in_features):
        state[f"{name}.weight"] = normal(out_features, in_features)
        if bias:
            state[f"{name}.bias"] = normal(out_features)

    def norm(name):
        state[f"{name}.weight"] = 1 + normal(N_EMBD)
        if bias:
            state[f"{name}.bias"] = normal(N_EMBD)

    for layer in range(N_LAYER):
        block = f"transformer.h.{layer}"
        norm(f"{block}.ln_1")
        if masks:
            state[f"{block}.attn.bias"] = torch.tril(torch.ones(BLOCK_SIZE, BLOCK_SIZE))[None, None]
        affine(f"{block}.attn.c_attn", 3 * N_EMBD, N_EMBD)
        affine(f"{block}.attn.c_proj", N_EMBD, N_EMBD)
        norm(f"{block}.ln_2")
        affine(f"{block}.mlp.c_fc", 4 * N_EMBD, N_EMBD)
        affine(f"{block}.mlp.c_proj", N_EMBD, 4 * N_EMBD)
    norm("transformer.ln_f")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return {prefix + name: weight for name, weight in state.items()}


def logits(state, ids, approximate):
    """Return the logits (seq, vocab_size) that these programs compute, from nn.Linear weights."""
    state = {name.removeprefix("_orig_mod."): weight.float() for name, weight in state.items()}

    def affine(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name, x):
        return F.layer_norm(x, (N_EMBD,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    seq, head_dim = len(ids), N_EMBD // N_HEAD
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:seq]
    future = torch.ones(seq, seq).triu(1).bool()
    for layer in range(N_LAYER):
        block = f"transformer.h.{layer}"
        query, key, value = (
            part.view(seq, N_HEAD, head_dim).transpose(0, 1)
            for part in affine(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(N_EMBD, dim=1)
        )
        scores = (query @ key.transpose(1, 2) / math.sqrt(head_dim)).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(seq, N_EMBD)
        x = x + affine(f"{block}.attn.c_proj", mixed)
        inner = F.gelu(affine(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)), approximate=approximate)
        x = x + affine(f"{block}.mlp.c_proj", inner)
    return norm("transformer.ln_f", x) @ state["lm_head.weight"].T


def save_nanogpt(path, state, *, bias=True):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.95))
    optimizer.step()
    vocab_size = next(iter(state.values())).shape[0]
    sizes = {"n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": N_EMBD, "block_size": BLOCK_SIZE}
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": {**sizes, "bias": bias, "vocab_size": vocab_size, "dropout": 0.1},
        "iter_num": 250,
        "best_val_loss": torch.tensor(3.2),
        "config": {"out_dir": "out", "eval_interval": 2000, "compile": True, "learning_rate": 6e-4},
    }
    torch.save(checkpoint, path)


@dataclasses.dataclass
class GPTConfig:
    block_size: int = BLOCK_SIZE
    vocab_size: int = 50304
    n_layer: int = N_LAYER
    n_head: int = N_HEAD
    n_embd: int = N_EMBD


@contextmanager
def in_main(*classes):
    """Let classes be pickled as those of a script, which no later process can import."""
    for each in classes:
        each.__module__, each.__qualname__ = "__main__", each.__name__
        setattr(sys.modules["__main__"], each.__name__, each)
    try:
        yield
    finally:
        for each in classes:
            delattr(sys.modules["__main__"], each.__name__)


def save_build_nanogpt(path, state):
    vocab_size = next(iter(state.values())).shape[0]
    with in_main(GPTConfig):
        checkpoint = {"model": state, "config": GPTConfig(vocab_size=vocab_size), "step": 19072, "val_loss": 3.07}
        torch.save(checkpoint, path)


def save_llmc(path, state, version, *, header=()):
    """Write version 3 (fp32) or 5 (bf16), with the vocabulary padded to a multiple of 128."""
    vocab_size = state["transformer.wte.weight"].shape[0]
    padding = -vocab_size % 128
    values = np.zeros(256, "<i4")
    values[:8] = 20240326, version, BLOCK_SIZE, vocab_size, N_LAYER, N_HEAD, N_EMBD, vocab_size + padding
    for index, value in dict(header).items():
        values[index] = value
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{layer}.{part}.{kind}" for layer in range(N_LAYER)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    with path.open("wb") as file:
        file.write(values.tobytes())
        for name in names:
            weight = state[name]
            if name == names[0]:
                weight = F.pad(weight, (0, 0, 0, padding))
            weight = weight if version == 3 else weight.bfloat16().view(torch.int16)
            file.write(weight.contiguous().numpy().tobytes())


def save_tensorflow(folder, state, *, more=None):
    """Write hparams.json, and the .index and .data files of a TensorFlow checkpoint of one shard."""
    folder.mkdir()
    vocab_size = state["transformer.wte.weight"].shape[0]
    sizes = {"n_vocab": vocab_size, "n_ctx": BLOCK_SIZE, "n_embd": N_EMBD, "n_head": N_HEAD, "n_layer": N_LAYER}
    (folder / "hparams.json").write_text(json.dumps(sizes))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    tensors = dict(more or {})
    for name, weight in state.items():
        parts = name.removeprefix("transformer.").replace("h.", "h", 1 if ".h." in name else 0).split(".")
        if parts[0] == "lm_head":
            continue
        if parts[0] in ("wte", "wpe"):
            parts.pop()
        elif "ln_" in parts[-2]:
            parts[-1] = {"weight": "g", "bias": "b"}[parts[-1]]
        else:
            weight = weight.T[None] if parts[-1] == "weight" else weight
            parts[-1] = parts[-1][0]
        tensors["/".join(["model", *parts])] = weight.numpy()
    data, entries = b"", {b"": bytes.fromhex("08011a020801")}  # one shard, written by version 1
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name]).tobytes()
        entries[name.encode()] = _bundle_entry(tensors[name].shape, len(data), len(value))
        data += value
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    (folder / "model.ckpt.index").write_bytes(_table(entries))


def _varint(value):
    parts = []
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _field(number, value):
    return (
        _varint(number << 3 | 2) + _varint(len(value)) + value
        if isinstance(value, bytes)
        else (_varint(number << 3) + _varint(value) if value else b"")
    )


def _bundle_entry(shape, offset, size):
    dims = b"".join(_field(2, _field(1, length)) for length in shape)
    checksum = _varint(6 << 3 | 5) + bytes(4)  # of the value; the reader does not check it
    return _field(1, 1) + _field(2, dims) + _field(4, offset) + _field(5, size) + checksum


def _block(entries):
    """Return a block of LevelDB's table format; every sixteenth key is stored completely."""
    content, restarts, last = b"", [], b""
    for number, (key, value) in enumerate(entries.items()):
        shared = 0
        if number % 16 == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        last = key
    return content + b"".join(offset.to_bytes(4, "little") for offset in [*(restarts or [0]), len(restarts) or 1])


def _table(entries):
    """Return two blocks of entries, and an index of them."""
    keys, table, index = list(entries), b"", {}
    for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
        block = _block({key: entries[key] for key in half})
        index[half[-1] + b"~"] = _varint(len(table)) + _varint(len(block))
        table += block + bytes(5)  # not compressed, and a checksum
    handles = b""
    for block in (_block({}), _block(index)):
        handles += _varint(len(table)) + _varint(len(block))
        table += block + bytes(5)
    return table + handles.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")
