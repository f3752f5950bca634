"""Attention kernels that need a GPU, at least for their gradients."""

import importlib.util

import pytest
import torch
from support.tiny_models import gradients, padded, tiny

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_loss_and_gradients_equal_those_of_eager_attention(attn_implementation, side):
    flash = attn_implementation == "flash_attention_2"
    if flash and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    batch = {name: value.cuda() for name, value in padded(side).items()}
    mask = batch["attention_mask"]
    # Only targets between two real tokens.
    labels = batch["input_ids"].masked_fill((mask & mask.roll(1, 1)) == 0, -100)
    labels[:, 0] = -100
    found = []
    for implementation in ("eager", attn_implementation):
        # The kernels need a head_dim of 16 or more; flash attention needs half precision.
        model = tiny(n_embd=64, attn_implementation=implementation).to("cuda", torch.bfloat16 if flash else None)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        found.append((loss.detach().float(), gradients(model)))
    tolerance = 0.05 if flash else 1e-3
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)
    for name, gradient in found[0][1].items():
        if name.endswith("c_attn.bias"):
            continue  # the gradient of the keys, a third of it, is zero except for rounding
        difference = (found[1][1][name] - gradient).float().norm()
        assert difference <= tolerance * gradient.float().norm() + 1e-6, name
