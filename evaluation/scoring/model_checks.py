"""What scoring takes for granted of a model, found out by two short forward passes before it begins."""

from typing import Any

import torch

from common.cli_errors import InputError
from evaluation.tasks.task_types import Ids

_TOKENS = 8
_TOLERANCE = 1e-3  # of the largest logit
_TOLERANCE_IN_HALF_PRECISION = 5e-2


@torch.inference_mode()
def examine(model: Any, ids: Ids, *, takes_positions: bool) -> bool:
    """Return whether the model counts positions as its callers do: 0, 1, …, which RoBERTa does not.

    Args:
        model: on its device, in evaluation mode.
        ids: a text, whose beginning is read.
        takes_positions: whether `position_ids` may be given; otherwise nothing is found out about them.

    Raises:
        InputError: its logits depend on later tokens, as BERT's do without `is_decoder`.
    """
    text = ids[:_TOKENS]
    # The same text with another last token; where there is none, the same text again.
    other = next((token for token in reversed(ids) if token != text[-1]), text[-1])
    rows = torch.tensor([text, (*text[:-1], other)], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=rows, use_cache=False).logits
    if _differ(logits[0, :-1], logits[1, :-1]):
        raise InputError(
            "expected a causal language model, found one whose predictions depend on the tokens that come later; give "
            "a model that was trained to continue a text (or set is_decoder in the config of one that can do both)"
        )
    if not takes_positions:
        return False
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    return not _differ(logits[:1], model(input_ids=rows[:1], position_ids=positions, use_cache=False).logits)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether logits differ by more than rounding; NaN does not differ, and is told when an item meets it."""
    if not one.numel():
        return False
    tolerance = _TOLERANCE if one.dtype == torch.float32 else _TOLERANCE_IN_HALF_PRECISION
    return bool((one.float() - other.float()).abs().max() > tolerance * one.float().abs().max())
