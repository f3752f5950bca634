"""Parity of our classes with the official ones, bit for bit, in every configuration.

Only flex attention sums in another order than the official attention that it is compared to, and has no gradients on a
CPU.
"""

import contextlib
import warnings

import pytest
import torch
from support.tiny_models import cache_of, given, gradients, one_thread, padded, pair, tokens  # noqa: F401 - a fixture for all
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM

pytestmark = pytest.mark.parity

OFFICIAL = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
# Official numbers of heads, smaller widths, odd and even depths.
NARROWED = {
    "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 12},
    "gpt2-medium": {"n_embd": 128, "n_layer": 3, "n_head": 16},
    "gpt2-large": {"n_embd": 80, "n_layer": 2, "n_head": 20},
    "gpt2-xl": {"n_embd": 100, "n_layer": 5, "n_head": 25},
}


@pytest.mark.parametrize("geometry", OFFICIAL)
def test_names_shapes_and_order_of_the_parameters_are_the_official_ones(geometry):
    with torch.device("meta"):
        ours = GPT2ScratchForCausalLM(GPT2ScratchConfig(**OFFICIAL[geometry]))
        official = GPT2LMHeadModel(GPT2Config(**OFFICIAL[geometry]))
    shapes = [[(name, one.shape) for name, one in model.named_parameters()] for model in (ours, official)]
    assert shapes[0] == shapes[1]
    assert ours.state_dict().keys() == official.state_dict().keys()


@contextlib.contextmanager
def uncompiled():
    """Disable the compilation of flex_attention, and its warning about that."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def twins(geometry, dtype, attn_implementation):
    """Return our model and the official one; flex attention is compared with official eager attention."""
    ours, official = pair("eager" if attn_implementation == "flex_attention" else attn_implementation, **geometry)
    ours.set_attn_implementation(attn_implementation)
    return ours.to(dtype), official.to(dtype)


def batch_of(padding):
    """Return inputs, labels and a mask of real tokens."""
    if padding == "none":
        return {"input_ids": tokens(3)}, tokens(3), torch.ones(3, 20, dtype=torch.bool)
    batch = padded(padding)
    real = batch["attention_mask"].bool()
    # Padding would predict the first token after it.
    after_real = torch.nn.functional.pad(real, (1, 0))[:, :-1]
    return batch, batch["input_ids"].masked_fill(~(real & after_real), -100), real


def assert_same(ours, official, attn_implementation, dtype):
    if attn_implementation != "flex_attention":
        assert torch.equal(ours, official)
    elif dtype == torch.float32:
        torch.testing.assert_close(ours, official, rtol=1e-4, atol=1e-4)
    else:
        # bfloat16 has 8 bits: each of up to 5 layers may round differently.
        difference = (ours.float() - official.float()).norm() / official.float().norm()
        assert difference < 0.03


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("geometry", NARROWED)
def test_all_outputs_equal_the_official_ones(geometry, attn_implementation, dtype, padding):
    ours, official = models = twins(NARROWED[geometry], dtype, attn_implementation)
    batch, labels, real = batch_of(padding)
    eager, flex = attn_implementation == "eager", attn_implementation == "flex_attention"

    with uncompiled() if flex else contextlib.nullcontext():
        one, other = (
            model(**batch, labels=labels, output_hidden_states=True, output_attentions=eager) for model in models
        )
        for name, count in (("hidden_states", len(ours.transformer.h) + 1), ("attentions", len(ours.transformer.h))):
            if name == "attentions" and not eager:
                continue
            assert len(one[name]) == len(other[name]) == count
            for a, b in zip(one[name], other[name], strict=True):
                # Outputs at padded positions are meaningless, and differ between masks.
                rows = (a[real], b[real]) if name == "hidden_states" else (a, b)
                assert_same(*rows, attn_implementation, dtype)
        assert_same(one.logits[real], other.logits[real], attn_implementation, dtype)
        assert_same(one.loss, other.loss, attn_implementation, dtype)
    if not flex:
        one.loss.backward()
        other.loss.backward()
        expected = gradients(official)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(ours).items())


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_all_outputs_under_bf16_autocast_equal_the_official_ones(attn_implementation):
    found = []
    for model in twins(NARROWED["gpt2"], torch.float32, attn_implementation):
        with torch.autocast("cpu", torch.bfloat16):
            out = model.train()(tokens(), labels=tokens())
        out.loss.backward()
        found.append((out.logits, out.loss, gradients(model)))
    (logits, loss, ours), (official_logits, official_loss, official) = found
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, official_logits)
    assert torch.equal(loss, official_loss)
    assert all(torch.equal(gradient, official[name]) for name, gradient in ours.items())


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("geometry", NARROWED)
def test_chunks_after_a_cache_equal_the_official_ones(geometry, attn_implementation, dtype, padding):
    models = twins(NARROWED[geometry], dtype, attn_implementation)
    batch, _, real = batch_of(padding)
    caches, past = [None, None], 0
    with uncompiled() if attn_implementation == "flex_attention" else torch.no_grad():
        complete = models[0](**batch).logits
        for size in (11, 1, 1, 7):
            piece = {name: value[:, past : past + size] for name, value in batch.items()}
            if "attention_mask" in batch:
                piece["attention_mask"] = batch["attention_mask"][:, : past + size]
            outs = [model(**piece, **given(cache)) for model, cache in zip(models, caches, strict=True)]
            caches = [cache_of(out) for out in outs]
            here = real[:, past : past + size]
            assert_same(outs[0].logits[here], outs[1].logits[here], attn_implementation, dtype)
            if dtype == torch.float32:
                found, expected = outs[0].logits[here], complete[:, past : past + size][here]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            past += size
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 20


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("geometry", NARROWED)
def test_ten_optimizer_steps_have_the_losses_of_the_official_model(geometry, attn_implementation):
    losses = []
    for model in twins(NARROWED[geometry], torch.float32, attn_implementation):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3, weight_decay=0.1)
        losses.append([])
        for step in range(10):
            batch, labels, _ = batch_of("right" if step % 2 else "none")
            loss = model(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
