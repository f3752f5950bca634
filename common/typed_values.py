"""Values from YAML files and command lines, converted to the type of a setting."""

import contextlib
import types
import typing
from typing import Any, Literal

from common.cli_errors import InputError

_INT_LIMIT = 1 << 63


def convert(name: str, kind: Any, value: Any) -> Any:
    """The value as type `kind`: int, float, bool, str, a Literal, a list, or a union of one with None or a Literal.

    YAML 1.1 reads `6e-4` as a string and `no` as False; here both are read as they look.

    Raises:
        InputError: the value is not of that type; the message begins with `name`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # `X | None` or `X | Literal[word]`
        kind, other = arguments
        if other is not types.NoneType:
            return value if value in typing.get_args(other) else convert(name, kind, value)
        is_none = value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))
        return None if is_none else convert(name, kind, value)
    if origin is Literal:
        value = {False: "no", True: "yes"}.get(value, value) if isinstance(value, bool) else value
        if value not in arguments:
            raise InputError(f"{name}: expected one of {', '.join(arguments)}, found {value!r}")
        return value
    if origin is list and typing.get_origin(arguments[0]) is Literal:
        return [convert(name, arguments[0], item) for item in (value if isinstance(value, list) else [value])]
    if origin is list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{name}: expected a list of strings, found {value!r:.80}")
        return [convert(name, str, item) for item in value]
    converter, expected = _CONVERTERS[kind]
    converted = converter(value)
    if converted is None:
        raise InputError(f"{name}: expected {expected}, found {value!r:.80}")
    # Bytes of a command line that are not UTF-8 arrive as lone surrogates.
    if isinstance(converted, str) and ("\0" in converted or converted != converted.encode(errors="replace").decode()):
        raise InputError(
            f"{name}: {converted!r:.80} holds a NUL, or bytes that are not UTF-8; write or rename it without"
        )
    return converted


def _to_int(value: Any) -> int | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and value.replace("_", "").removeprefix("-").isdecimal():
        with contextlib.suppress(ValueError):  # thousands of digits
            number = int(value.replace("_", ""))
    elif number is None and (decimal := _to_float(value)) is not None and decimal.is_integer():
        number = int(decimal)  # 1e9 is an integer too
    return number if number is not None and abs(number) < _INT_LIMIT else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(str(value).lower())


def _to_str(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


_CONVERTERS: dict[type, tuple[Any, str]] = {
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    bool: (_to_bool, "true or false"),
    str: (_to_str, "a string"),
}
