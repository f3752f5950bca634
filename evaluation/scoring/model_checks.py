"""Check, in two short forward passes, that a model meets the assumptions of scoring."""

from typing import Any

import torch

from common.cli_errors import InputError
from evaluation.tasks.task_types import Ids

_TOKENS = 8
_TOLERANCE = 1e-3  # relative to the largest logit
_TOLERANCE_IN_HALF_PRECISION = 5e-2


@torch.inference_mode()
def takes_positions_from_zero(model: Any, ids: Ids, *, check_positions: bool) -> bool:
    """Return whether `position_ids` of 0, 1, … match the model's default; RoBERTa's start after the pad token.

    The first tokens of `ids` are read. `check_positions=False` only checks that the model is causal, and returns False.

    Raises:
        InputError: the model is not causal: its logits depend on later tokens, as BERT's do without `is_decoder`.
    """
    text = ids[:_TOKENS]
    # The same text with another last token, if there is a different one.
    other = next((token for token in reversed(ids) if token != text[-1]), text[-1])
    rows = torch.tensor([text, (*text[:-1], other)], device=model.get_input_embeddings().weight.device)
    logits = model(input_ids=rows, use_cache=False).logits
    if _differ(logits[0, :-1], logits[1, :-1]):
        raise InputError(
            "the model is not a causal language model: its predictions depend on later tokens; use a model that was "
            "trained to continue text, or set is_decoder in the config of one that can do both"
        )
    if not check_positions:
        return False
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    return not _differ(logits[:1], model(input_ids=rows[:1], position_ids=positions, use_cache=False).logits)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether logits differ by more than rounding; NaN counts as equal, and is reported with its item later."""
    if not one.numel():
        return False
    tolerance = _TOLERANCE if one.dtype == torch.float32 else _TOLERANCE_IN_HALF_PRECISION
    return bool((one.float() - other.float()).abs().max() > tolerance * one.float().abs().max())
