import math

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import TINY, cache_of, given, gradients, one_thread, padded, pair, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import GPT2Model

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM

pytestmark = pytest.mark.parity

# --- parity with the official implementation --------------------------------------------------------------------------


def test_logits_loss_and_every_gradient_equal_the_official_ones_exactly():
    ours, official = pair()
    input_ids = tokens()
    labels = input_ids.masked_fill(torch.rand(input_ids.shape) < 0.2, -100)
    for model in (ours, official):
        model.out = model(input_ids, labels=labels)
        model.out.loss.backward()
    assert torch.equal(ours.out.logits, official.out.logits)
    assert torch.equal(ours.out.loss, official.out.loss)
    expected = gradients(official)
    assert gradients(ours).keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(ours).items())


@pytest.mark.parametrize("option", [{"n_inner": 40}, {"scale_attn_weights": False}, {"activation_function": "relu"}])
def test_options_of_the_architecture_equal_the_official_ones(option):
    ours, official = pair(**option)
    assert torch.equal(ours(tokens()).logits, official(tokens()).logits)


def test_sdpa_agrees_with_eager():
    input_ids = tokens()
    # Another order of summation in fp32 changes a few units in the last place of values near 10.
    torch.testing.assert_close(
        tiny(attn_implementation="sdpa")(input_ids).logits, tiny()(input_ids).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_the_official_result_and_the_unpadded_one(side, attn_implementation):
    ours, official = pair(attn_implementation)
    batch = padded(side)
    logits = ours(**batch).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(logits[real], official(**batch).logits[real])
    for row in range(3):
        alone = ours(batch["input_ids"][row][real[row]].unsqueeze(0)).logits[0]
        # The kernel may group the sum over a longer row differently.
        torch.testing.assert_close(logits[row][real[row]], alone, rtol=1e-4, atol=1e-4)


def test_position_ids_and_inputs_embeds_are_used():
    ours, official = pair()
    input_ids, position_ids = tokens(), tokens(1, 20, seed=5) % 48
    assert torch.equal(
        ours(input_ids, position_ids=position_ids).logits, official(input_ids, position_ids=position_ids).logits
    )
    embeds = ours.transformer.wte(input_ids)
    assert torch.equal(ours(inputs_embeds=embeds).logits, ours(input_ids).logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_cached_decoding_equals_the_official_one_and_a_full_forward_pass(attn_implementation):
    ours, official = pair(attn_implementation)
    input_ids, caches, pieces = tokens(), {}, []
    for piece in input_ids.split([9, 1, 1, 5, 4], dim=1):
        outs = {model: model(piece, **given(caches.get(model))) for model in (ours, official)}
        caches = {model: cache_of(out) for model, out in outs.items()}
        assert torch.equal(outs[ours].logits, outs[official].logits)
        pieces.append(outs[ours].logits)
    assert caches[ours].get_seq_length() == 20
    torch.testing.assert_close(torch.cat(pieces, 1), ours(input_ids).logits, rtol=1e-4, atol=1e-4)


def test_cache_is_returned_only_on_request():
    assert cache_of(tiny()(tokens(), use_cache=False)) is None
    assert cache_of(tiny(use_cache=False)(tokens())) is None
    assert cache_of(tiny()(tokens())) is not None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_cache_is_accepted_under_both_its_names(name):
    model, input_ids = tiny(), tokens()
    for taker in (model, model.transformer):
        cache = cache_of(taker(input_ids[:, :12]))
        found = taker(input_ids[:, 12:], **{name: cache})[0]
        assert cache.get_seq_length() == 20
        torch.testing.assert_close(found, taker(input_ids)[0][:, 12:], rtol=1e-4, atol=1e-4)


def test_two_caches_are_refused():
    model = tiny()
    cache = cache_of(model(tokens()))
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(tokens(seq=1), cache=cache, past_key_values=cache)


def test_hidden_states_and_attentions_equal_the_official_ones():
    ours, official = pair()
    one, other = (model(tokens(), output_hidden_states=True, output_attentions=True) for model in (ours, official))
    assert len(one.hidden_states) == 4
    assert len(one.attentions) == 3
    assert one.attentions[0].shape == (2, 4, 20, 20)
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(one, name), getattr(other, name), strict=True))
    assert ours(tokens()).hidden_states is None


def test_base_model_equals_the_official_one():
    ours, official = pair()
    base = GPT2Model(official.config).eval()
    base.load_state_dict(official.transformer.state_dict())
    assert torch.equal(ours.transformer(tokens()).last_hidden_state, base(tokens()).last_hidden_state)


def test_dropout_draws_the_same_masks_as_the_official_model():
    ours, official = pair(resid_pdrop=0.1, embd_pdrop=0.2, attn_pdrop=0.3)
    logits = []
    for model in (ours.train(), official.train()):
        torch.manual_seed(7)
        logits.append(model(tokens()).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], ours.eval()(tokens()).logits)


# --- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_the_future_never_changes_the_past(attn_implementation):
    ours, input_ids = tiny(attn_implementation=attn_implementation), tokens()
    before = ours(input_ids).logits
    for position in (1, 10, 19):
        changed = input_ids.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 96
        after = ours(changed).logits
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


def test_initial_weights_have_the_standard_deviations_of_gpt2():
    torch.manual_seed(0)
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig(**{**TINY, "n_embd": 128, "n_layer": 8, "vocab_size": 500}))
    for name, parameter in model.named_parameters():
        if "ln_" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            # At least 6,144 draws: their standard deviation has a relative error near 1 / sqrt(2 * 6144) = 0.9 %.
            assert parameter.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


def test_head_is_the_token_embedding_before_and_after_saving(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    for one in (model, GPT2ScratchForCausalLM.from_pretrained(tmp_path)):
        assert one.lm_head.weight is one.transformer.wte.weight
    untied = tiny(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model = tiny(resid_pdrop=0.1).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            # transformers 5.17, the oldest we support, knows only the former name, which later versions warn about.
            name = "activation_checkpointing_enable"
            enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
            enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        torch.manual_seed(2)
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# --- training path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(57)])
def test_shift_labels_give_the_loss_and_gradients_of_labels(num_items_in_batch):
    model, input_ids = tiny(), tokens(seq=21)
    labels = input_ids.masked_fill(torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.2, -100)
    found = []
    for batch in ({"labels": labels[:, 1:], "shift": True}, {"labels": labels, "shift": False}):
        model.zero_grad()
        if batch["shift"]:
            out = model(input_ids[:, :-1], shift_labels=batch["labels"], num_items_in_batch=num_items_in_batch)
            assert out.logits is None
        else:
            out = model(input_ids, labels=batch["labels"], num_items_in_batch=num_items_in_batch)
        out.loss.backward()
        found.append((out.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    for name, gradient in found[0][1].items():
        # The same fp32 sums in another order.
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-6)


def test_shift_labels_with_labels_equal_the_official_model():
    targets = tokens(seed=5)
    one, other = (model(tokens(), labels=tokens(), shift_labels=targets) for model in pair())
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.logits, other.logits)
    torch.testing.assert_close(one.loss, tiny()(tokens(), shift_labels=targets).loss, rtol=1e-6, atol=0)
