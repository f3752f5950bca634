"""The item cache: one line per scored item, in a file next to the results.

Interrupted evaluations resume after the last complete line. The key of an item hashes its requests, its protocol and
the code that scores it, so another limit, more tasks, a repaired data file or an update only cost the new items. The
model is identified by weights, config and tokenizer, so a model that was trained further never reuses results. Every
line has a checksum; an item whose line is corrupted is scored again.
"""

import array
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from common.cli_errors import InputError
from evaluation.tasks.task_types import Generation, Item, Task, data_hash

_IRRELEVANT_CONFIG = {"_name_or_path", "_commit_hash", "auto_map", "transformers_version", "dtype", "torch_dtype"}
_HEADER_START = b'{"model": '


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """Return a hash of the weights, the config and the tokenizer, but not of device and path; reads about 1 GB/s."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IRRELEVANT_CONFIG}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(repr(getattr(model.generation_config, "eos_token_id", None)).encode())  # ends generated text
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    digest.update(vocabulary.encode())
    digest.update(json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def code_fingerprint(model: Any) -> str:
    """Return a hash of the code behind a record: tasks, scoring, the model's classes, and the libraries they run on."""
    package = Path(__file__).parents[1]
    paths = [*package.glob("tasks/*.py"), *package.glob("scoring/*.py")]
    paths += [Path(inspect.getfile(each)) for each in set(map(type, model.modules()))]
    digest = hashlib.blake2b(digest_size=16)
    for content in sorted({path.read_bytes() for path in paths}):
        digest.update(content)
    digest.update(" ".join(metadata.version(name) for name in ("torch", "transformers", "tokenizers")).encode())
    return digest.hexdigest()


def item_key(task: Task, item: Item, code: str = "") -> str:
    """Return a hash of everything that an item's record depends on, except the model; `code` is `code_fingerprint`."""
    digest = hashlib.blake2b(f"{task.full_name} {item.index} {item.gold!r} {item.data}".encode(), digest_size=12)
    digest.update(code.encode())
    # The one entry that JSON cannot hold is the tokenizer's `decode`, which the model's fingerprint covers.
    digest.update(json.dumps(dict(item.extra), sort_keys=True, default=lambda decode: None).encode())
    for request in item.requests:
        digest.update(array.array("Q", request.context).tobytes())
        if isinstance(request, Generation):
            digest.update(f" + {request.max_new_tokens} ".encode())
        else:
            digest.update(b" | " + array.array("Q", request.continuation).tobytes())
            digest.update(array.array("Q", sorted(request.excluded)).tobytes())
    return digest.hexdigest()


class ItemCache:
    """The records of scored items, and the file that keeps them.

    `weights` is the `model_fingerprint`, `code` the `code_fingerprint`. `corrupted` counts the lines of the file that
    do not match their checksum.

    Raises:
        InputError: the file is of another model, is not an item cache, or is not writable.
    """

    def __init__(self, path: Path, *, model: str, weights: str, dtype: str, code: str = "") -> None:
        self.corrupted = 0
        self._records: dict[str, dict[str, Any]] = {}
        self._path, self._code = path, code
        try:
            if path.exists() and path.stat().st_size:
                self._read(weights, dtype)
            self._file = path.open("ab", buffering=0)  # after a failed write, nothing remains in a buffer
            if not self._file.tell():
                self._write({"model": model, "weights": weights, "dtype": dtype})
        except OSError as error:
            raise InputError(f"cannot write the item cache: {error}; choose another --output") from None

    def _read(self, weights: str, dtype: str) -> None:
        content = self._path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]  # the writer may have been killed inside a line, even the first
        header, *lines = map(_parsed, complete.splitlines() or [b""])
        killed_at_once = not complete and _HEADER_START.startswith(content[: len(_HEADER_START)])
        if not killed_at_once and not {"model", "weights", "dtype"} <= set(header):
            raise InputError(f"{self._path} exists and is not an item cache; choose another --output")
        os.truncate(self._path, len(complete))
        if header:
            refuse_another_model(self._path, header, weights, dtype)
        valid = [line for line in lines if line.get("checksum") == _checksum(line)]
        self.corrupted = len(lines) - len(valid)
        self._records = {line["key"]: line["record"] for line in valid}

    def get(self, task: Task, item: Item) -> dict[str, Any] | None:
        """Return an item's record, or None."""
        return self._records.get(item_key(task, item, self._code))

    def add(self, task: Task, item: Item, record: dict[str, Any]) -> None:
        """Keep an item's record."""
        line = {"key": item_key(task, item, self._code), "record": record}
        self._write(line | {"checksum": _checksum(line)})

    def _write(self, line: Mapping[str, Any]) -> None:
        rest = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.close()
            raise InputError(
                f"cannot write {self._path}: {error.strerror}; free some space and run the same command again to resume"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def refuse_another_model(path: Path, found: Mapping[str, Any], weights: str, dtype: str) -> None:
    """Raise an `InputError` if `found`, the header of `path`, is of another model, or of another dtype."""
    if found["dtype"] != dtype:
        difference = f"in {found['dtype']}, not {dtype}"
    elif found["weights"] != weights:
        difference = "with other weights, config or tokenizer"
    else:
        return
    raise InputError(
        f"{path} holds results of {found['model']} {difference}; choose another --output, or delete that file"
    )


def _checksum(line: Mapping[str, Any]) -> str:
    return data_hash([line.get("key"), line.get("record")])


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
