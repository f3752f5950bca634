"""Document masking: no attention across document boundaries, and positions that restart at each document.

A packed window holds the end of one document, complete documents, and the beginning of another. Given positions that
restart, `create_causal_mask` of transformers builds the mask: a block mask for flex attention, which skips blocks
between documents, or a dense one for sdpa and eager, which costs (batch, 1, seq, seq) of memory and the fast causal
kernel.
"""

import torch
from torch import Tensor

from training.recipe import Recipe


def document_positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """Positions (batch, seq) that restart at each end-of-text token, which starts a document.

    The rest of a document that began before the window counts from 0 too.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    starts = torch.where(input_ids == end_of_text_id, positions, 0).cummax(dim=-1).values
    return positions - starts


def attention_for(recipe: Recipe, device_type: str) -> str:
    """The attention implementation to train with: the recipe's, but flex instead of sdpa for a document mask on a GPU.

    Flex attention has no dropout; a recipe with dropout keeps the dense mask.
    """
    if recipe.document_mask and device_type == "cuda" and recipe.attn_implementation == "sdpa" and not recipe.dropout:
        return "flex_attention"
    return recipe.attn_implementation
