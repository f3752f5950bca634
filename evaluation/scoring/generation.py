"""Greedy continuations of contexts of different lengths, in one batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList


@torch.inference_mode()
def generate(
    model: Any, contexts: Sequence[Sequence[int]], new_tokens: int, n_positions: int | None
) -> list[tuple[int, ...] | None]:
    """Return greedy continuations of at most `new_tokens` tokens, without end-of-sequence tokens; None for NaN.

    Contexts are truncated on the left to fit `n_positions` together with the new tokens. Of the model's own generation
    config (penalties, suppressed tokens, …) only the end-of-sequence tokens count.
    """
    longest = n_positions - new_tokens if n_positions else None
    rows = [list(context)[-longest:] if longest else list(context) for context in contexts]
    width = max(map(len, rows))
    padding = _padding_id(model)
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    is_nan = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def check_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
        is_nan.logical_or_(scores.isnan().any(-1))
        return scores

    own_config = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own_config.eos_token_id, pad_token_id=padding)
    try:
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            logits_processor=LogitsProcessorList([check_nan]),
        )
    finally:
        model.generation_config = own_config
    eos = own_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    continuations: list[tuple[int, ...] | None] = []
    for ids, failed in zip(output[:, width:].tolist(), is_nan.tolist(), strict=True):
        end = next((position for position, token in enumerate(ids) if token in eos_ids), new_tokens)
        continuations.append(None if failed else tuple(ids[:end]))
    return continuations


def _padding_id(model: Any) -> int:
    """Return a token for padding; the mask hides it."""
    config = model.config.get_text_config()
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, list) else value
        if value is not None and 0 <= value < config.vocab_size:
            return int(value)
    return 0
