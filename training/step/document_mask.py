"""Documents apart: no attention across the end of one, and positions that restart at each.

A packed window holds the end of one document, whole ones, and the beginning of the last. Given positions that restart,
`create_causal_mask` of transformers makes the mask that keeps documents apart: a block mask for flex attention, which
skips the blocks between documents, and a dense one for sdpa and eager, which costs (batch, 1, seq, seq) of memory and
the fast causal kernel.
"""

import torch
from torch import Tensor

from training.recipe import Recipe


def document_positions(input_ids: Tensor, end_of_text_id: int) -> Tensor:
    """Positions (batch, seq) that restart at each end-of-text token, with which every document begins.

    What comes before the first one, the rest of a document that began earlier, counts from 0 too.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    begins = torch.where(input_ids == end_of_text_id, places, 0).cummax(dim=-1).values
    return places - begins


def attention_for(recipe: Recipe, device_type: str) -> str:
    """The attention implementation to train with: the recipe's, but flex instead of sdpa for documents apart on a GPU.

    Flex attention has no dropout, so a recipe that asks for some keeps the dense mask.
    """
    if recipe.document_mask and device_type == "cuda" and recipe.attn_implementation == "sdpa" and not recipe.dropout:
        return "flex_attention"
    return recipe.attn_implementation
