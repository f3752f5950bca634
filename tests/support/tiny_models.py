"""Tiny models, official models with the same weights, and inputs for both."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from gpt2_scratch.pretrained_gpt2_scratch import CACHE_NAME

TINY = {
    "vocab_size": 97,
    "n_positions": 48,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 96,
    "eos_token_id": 96,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: two are slower for matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**overrides):
    torch.manual_seed(0)
    # Weights ten times larger than usual make attention and predictions far from uniform.
    return GPT2ScratchForCausalLM(
        GPT2ScratchConfig(**{**TINY, "initializer_range": 0.2, "attn_implementation": "eager", **overrides})
    ).eval()


def pair(attn_implementation="eager", **overrides):
    """Return our model and the official one with the same weights."""
    ours = tiny(attn_implementation=attn_implementation, **overrides)
    config = GPT2Config(**{**TINY, "attn_implementation": attn_implementation, **overrides})
    config.loss_type = "ForCausalLM"  # the official class guesses it, with a warning
    official = GPT2LMHeadModel(config).eval()
    official.load_state_dict(ours.state_dict())
    return ours, official


def given(cache):
    """Return the keyword argument for a cache in this version of transformers."""
    return {CACHE_NAME: cache}


def cache_of(output):
    """Return the cache of a model output."""
    return getattr(output, CACHE_NAME)


def tokens(batch=2, seq=20, seed=1):
    return torch.randint(0, 96, (batch, seq), generator=torch.Generator().manual_seed(seed))


def padded(side, lengths=(20, 13, 7)):
    """Return padded token ids, mask and position ids of sequences of several lengths."""
    input_ids, mask = tokens(len(lengths)), torch.zeros(len(lengths), 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(20 - length, None) if side == "left" else slice(0, length)] = 1
    return {
        "input_ids": input_ids * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
