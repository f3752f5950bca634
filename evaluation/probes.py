"""What scoring takes for granted of a model, found out by three short forward passes before it begins."""

from typing import Any

import torch

from evaluation.items import Ids
from gpt2_scratch_errors import InputError

_TOKENS = 16
_TOLERANCE = 1e-3  # of the largest logit
_TOLERANCE_IN_HALF_PRECISION = 5e-2


@torch.inference_mode()
def refuse_unless_causal(model: Any, ids: Ids) -> None:
    """Refuse a model whose logits depend on later tokens, such as BERT's without `is_decoder`.

    Args:
        model: on its device, in evaluation mode.
        ids: a text; its beginning is read with two last tokens.

    Raises:
        InputError: they do.
    """
    text = ids[:_TOKENS]
    other = next((token for token in reversed(text[:-1]) if token != text[-1]), None)
    if other is None:  # too short a text, or the same token all along
        return
    logits = model(input_ids=_rows(model, text, (*text[:-1], other)), use_cache=False).logits
    if _differ(logits[0, :-1], logits[1, :-1]):
        raise InputError(
            "expected a causal language model, found one whose predictions depend on the tokens that come later; give "
            "a model that was trained to continue a text (or set is_decoder in the config of one that can do both)"
        )


@torch.inference_mode()
def counts_positions_from_zero(model: Any, ids: Ids) -> bool:
    """Return whether the model's own positions are 0, 1, …, which RoBERTa's are not.

    Args:
        model: on its device, in evaluation mode; takes `position_ids`.
        ids: a text, whose beginning is read.
    """
    rows = _rows(model, ids[:_TOKENS])
    own = model(input_ids=rows, use_cache=False).logits
    told = torch.arange(rows.shape[1], device=rows.device)[None]
    return not _differ(own, model(input_ids=rows, position_ids=told, use_cache=False).logits)


def _rows(model: Any, *texts: Ids) -> torch.Tensor:
    return torch.tensor(texts, device=model.get_input_embeddings().weight.device)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether logits differ by more than rounding; NaN does not differ, and is told when an item meets it."""
    tolerance = _TOLERANCE if one.dtype == torch.float32 else _TOLERANCE_IN_HALF_PRECISION
    return bool((one.float() - other.float()).abs().max() > tolerance * one.float().abs().max())
