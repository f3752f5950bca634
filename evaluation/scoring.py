"""The log-likelihood of continuations."""

from collections.abc import Callable, Sequence
from typing import Any

from evaluation.items import Item

Answers = list[Any]


def score(
    model: Any,
    items: Sequence[Item],
    *,
    accelerator: Any = None,
    tokens_per_batch: int = 16_384,
    share_prefixes: bool = True,
    on_result: Callable[[Item, Answers], None] = lambda item, answers: None,
) -> list[Answers]:
    """Return the answers to every item's requests, in the order of `items`, on every process.

    Args:
        model: any causal language model of transformers, on its device, not wrapped.
        items: of any tasks; those that were finished earlier are simply not passed.
        accelerator: spreads the items over its processes; None for this process alone.
        tokens_per_batch: tokens in a forward pass, padding included; halved when memory runs out.
        share_prefixes: compute what the requests of an item begin with once.
        on_result: is called on the main process with each item as soon as it is answered, in the order of scoring.

    Raises:
        InputError: the model gives NaN, or an item does not fit its positions.
    """
    raise NotImplementedError
