"""How a recipe declares its keys: each field carries its help, bounds, group and where it is shown."""

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

BOUNDS = {
    "at_least": (operator.ge, "at least {:,}"),
    "more_than": (operator.gt, "more than {:,}"),
    "at_most": (operator.le, "at most {:,}"),
    "less_than": (operator.lt, "less than {:,}"),
}


def setting(
    help_text: str,
    default: Any = dataclasses.MISSING,
    *,
    group: Literal["data", "model"] | None = None,
    per_node: bool = False,
    on_card: bool = True,
    by_optimizer: Mapping[str, Any] | None = None,
    **bounds: float,
) -> Any:
    """A field of the recipe.

    Args:
        help_text: documentation of the key and help of the flag.
        default: value when the recipe has no such key; without it, the key is required.
        group: "data" and "model" are the run's identity, which a resumed run may not change.
        per_node: nodes of one run may have different values.
        on_card: the model card lists the value. Not for paths, and not for what the card describes in words.
        by_optimizer: the default for each optimizer that has this setting; it stays None for others.
        bounds: limits of a number, by the names in `BOUNDS`.
    """
    metadata: dict[str, Any] = {"help": help_text, "group": group, "per_node": per_node, "on_card": on_card}
    metadata["bounds"] = bounds
    if by_optimizer:
        defaults = ", ".join(f"{optimizer}: {value:g}" for optimizer, value in by_optimizer.items())
        metadata |= {"help": f"{help_text} (default of {defaults})", "by_optimizer": by_optimizer}
        return field(default=None, metadata=metadata)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def off_card(help_text: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A `setting` that the model card does not list."""
    return setting(help_text, default, on_card=False, **options)


def local(help_text: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A `setting` of one node: a path, or what only rank 0 does. The model card does not list it."""
    return off_card(help_text, default, per_node=True, **options)
