"""JSON objects from disk: whatever the bytes are, a dictionary or a `ValueError`."""

import json
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Instance = TypeVar("Instance")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: the file is not UTF-8 or not JSON, nested too deeply, holds a number of thousands of digits, or
            something else than an object.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds no object but {type(value).__name__}")
    return value


def instance_of(kind: type[Instance], values: object) -> Instance:
    """Return an instance of the dataclass `kind` with the values of a JSON object.

    Raises:
        ValueError: the keys or the types of the values are not those of its fields.
    """
    from huggingface_hub.dataclasses import type_validator

    if not isinstance(values, dict):
        raise ValueError(f"{values!r:.40} is not an object")
    try:
        instance = kind(**values)
        for name, hint in get_type_hints(kind).items():
            type_validator(name, getattr(instance, name), hint)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return instance
