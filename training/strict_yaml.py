"""YAML whose values are what they look like: YAML 1.1 would read `1:30` as 90 and `0123` as 83, and keep the last of
two equal keys.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from common.cli_errors import InputError

_SURPRISING = re.compile(r"[-+]?(0[\d_]+|[^.]*:.*)")  # octal and base 60
_MAX_DIGITS = 1000
_LARGEST_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, and numbers that are not decimal."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise _error(key, f"the key {key.value} appears twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def decimal(self, node: yaml.ScalarNode) -> Any:
        """Return a number, or refuse it."""
        if _SURPRISING.fullmatch(node.value) or len(node.value) > _MAX_DIGITS:
            raise _error(node, f"{node.value:.40} is ambiguous: write a decimal number, or quote a text")
        kind = "int" if node.tag.endswith("int") else "float"
        return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(self, node)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.decimal)


def _error(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(path: Path, what: str) -> dict[Any, Any]:
    """Return the keys of a YAML file; `what` names the file in errors.

    Raises:
        InputError: the file is not valid YAML, or holds no keys.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:  # such as /dev/zero, or a corpus
        raise InputError(f"{what} {path} is larger than {_LARGEST_BYTES:,} bytes; check the path")
    try:
        keys = yaml.load(content.decode("utf-8"), _StrictLoader)
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8 ({error.reason}); save it again as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), "expected lines of `key: value`"
        if isinstance(error, yaml.constructor.ConstructorError) and error.problem:
            problem = error.problem
        line = f" (line {mark.line + 1})" if mark else ""
        raise InputError(f"{what} {path} is not valid YAML{line}; {problem}") from None
    if not isinstance(keys, dict):
        raise InputError(f"{what} {path} holds no keys; expected lines of `key: value`")
    return keys
