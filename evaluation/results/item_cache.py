"""Items that were scored already: a line each in a file beside the results, written as they finish.

Whoever is killed in the middle goes on behind the last whole line. An item is known by what it asks and under which
protocol, so another limit, more tasks or a mended data file cost only the items that are new; the model is known by
its weights, its config and its tokenizer, so that one that was trained further or mended never inherits results.
"""

import array
import hashlib
import json
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from evaluation.tasks.task_types import Generation, Item, Task

_NOT_OF_THE_MODEL = {"_name_or_path", "_commit_hash", "auto_map", "transformers_version", "dtype", "torch_dtype"}
_BEGINNING = b'{"model": '  # of a file whose writer was killed inside its first line


def items_path(output: Path) -> Path:
    """Return where the finished items of `results.json` are kept: `results.items.jsonl`."""
    return output.with_suffix(".items.jsonl")


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """Return a hash of all that makes a model's answers: every weight, the config and the tokenizer; no device or path.

    It reads all of the weights, at about 1 GB/s.
    """
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(repr(getattr(model.generation_config, "eos_token_id", None)).encode())  # ends what it writes
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    digest.update(vocabulary.encode())
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def item_key(task: Task, item: Item) -> str:
    """Return a hash of all that an item's record depends on but the model."""
    digest = hashlib.blake2b(f"{task.full_name} {item.index} {item.gold!r} {item.data}".encode(), digest_size=12)
    # The one fact that JSON cannot hold is how the tokenizer decodes, which the model's fingerprint covers.
    digest.update(json.dumps(dict(item.facts), sort_keys=True, default=lambda decode: None).encode())
    for request in item.requests:
        digest.update(array.array("Q", request.context).tobytes())
        if isinstance(request, Generation):
            digest.update(f" + {request.max_new_tokens} ".encode())
        else:
            digest.update(b" | " + array.array("Q", request.continuation).tobytes())
            digest.update(array.array("Q", sorted(request.excluded)).tobytes())
    return digest.hexdigest()


class FinishedItems:
    """The records that are known already, and a file that keeps new ones.

    Args:
        path: the file, made when absent; None keeps nothing.
        model: what the user calls the model, for messages.
        weights: the `model_fingerprint`.
        dtype: what it computes in, "bfloat16".

    Raises:
        InputError: the file belongs to another model, is none of ours, or cannot be written.
    """

    def __init__(self, path: Path | None, *, model: str, weights: str, dtype: str) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self._path = path
        self._file: RawIOBase | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size:
                self._read(path, weights, dtype)
            self._file = path.open("ab", buffering=0)  # what could not be written is not kept for later
            if not self._file.tell():
                self._write({"model": model, "weights": weights, "dtype": dtype})
        except OSError as error:
            raise InputError(f"expected --output where files can be written, found {error}; choose another") from None

    def _read(self, path: Path, weights: str, dtype: str) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        head, *lines = map(_parsed, whole.splitlines() or [content])
        ours = (
            {"model", "weights", "dtype"} <= set(head) if whole else _BEGINNING.startswith(content[: len(_BEGINNING)])
        )
        if not ours:
            raise InputError(f"expected finished items in {path}, found another file; choose another --output")
        if len(whole) < len(content):  # its writer was killed inside a line
            with path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            return
        refuse_another_model(path, head, weights, dtype)
        self.records = {line["key"]: line["record"] for line in lines if {"key", "record"} <= set(line)}

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep an item's record."""
        self.records[key] = record
        if self._file is not None:
            self._write({"key": key, "record": record})

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file is not None
        rest = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.close()
            raise InputError(
                f"expected to keep finished items in {self._path}, found {error.strerror}; make room, and the "
                "same command goes on behind those that are there"
            ) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def refuse_another_model(path: Path, found: Mapping[str, Any], weights: str, dtype: str) -> None:
    """Refuse a file that holds results of a model with another fingerprint, or of the same in another dtype.

    Raises:
        InputError: it does.
    """
    if (found["weights"], found["dtype"]) != (weights, dtype):
        raise InputError(
            f"expected results of this model in {dtype} in {path}, found those of {found['model']} in {found['dtype']}"
            f"{', with other weights, config or tokenizer' if found['dtype'] == dtype else ''}; choose another "
            "--output, or delete that file"
        )


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
