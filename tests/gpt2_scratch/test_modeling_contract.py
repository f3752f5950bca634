"""The properties of transformers' common model tests that apply here."""

import inspect
import pickle
import warnings

import pytest
import torch
from support.tiny_models import TINY, cache_of, gradients, one_thread, padded, pair, tiny, tokens  # noqa: F401 - a fixture for all
from torch import nn
from transformers import GPT2LMHeadModel

from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchModel,
    modeling_gpt2_scratch,
)

pytestmark = pytest.mark.parity

CLASSES = [GPT2ScratchForCausalLM, GPT2ScratchModel, GPT2ScratchForSequenceClassification]


def build(model_class, **overrides):
    torch.manual_seed(0)
    config = GPT2ScratchConfig(**{**TINY, "pad_token_id": 0, "attn_implementation": "eager", **overrides})
    return model_class(config).eval()


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", CLASSES)
def test_tuple_output_equals_the_named_output(model_class):
    model = build(model_class)
    wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    named = model(tokens(), **wanted)
    unnamed = model(tokens(), return_dict=False, **wanted)
    assert isinstance(unnamed, tuple)
    assert len(unnamed) == len(named.to_tuple()) == 3
    assert torch.equal(unnamed[0], named[0])
    for one, other in zip(unnamed[1:], named.to_tuple()[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("model_class", CLASSES)
def test_hidden_states_and_attentions_can_be_requested_in_the_config(model_class):
    model = build(model_class, output_hidden_states=True, output_attentions=True)
    out = model(tokens())
    assert [state.shape for state in out.hidden_states] == [(2, 20, 32)] * 4
    assert [weights.shape for weights in out.attentions] == [(2, 4, 20, 20)] * 3
    assert model(tokens(), output_attentions=False).attentions is None


def test_attentions_are_probabilities_over_the_past_and_never_over_padding():
    batch = padded("left")
    real = batch["attention_mask"].bool()
    seen = (real[:, None, :] & torch.ones(20, 20).tril().bool())[real]  # (tokens, seq)
    for weights in tiny()(**batch, output_attentions=True).attentions:
        rows = weights.transpose(1, 2)[real]  # (tokens, n_head, seq)
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
        assert torch.equal(rows > 0, seen[:, None, :].expand_as(rows))


def test_gradients_reach_hidden_states_and_attentions():
    out = tiny().train()(tokens(), output_hidden_states=True, output_attentions=True)
    kept = [*out.hidden_states[:-1], *out.attentions]
    for tensor in kept:
        tensor.retain_grad()
    out.logits.sum().backward()
    assert all(tensor.grad is not None for tensor in kept)


def test_logits_to_keep_returns_those_positions():
    ours, input_ids = tiny(), tokens()
    complete = ours(input_ids).logits
    # Matrix products of another shape may sum in another order.
    torch.testing.assert_close(ours(input_ids, logits_to_keep=3).logits, complete[:, -3:], rtol=1e-5, atol=1e-5)
    kept = torch.tensor([0, 7])
    torch.testing.assert_close(ours(input_ids, logits_to_keep=kept).logits, complete[:, kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [None, 57, torch.tensor(57)])
def test_num_items_in_batch_divides_the_loss_as_in_the_official_class(count):
    found = []
    for model in pair():
        loss = model(tokens(), labels=tokens(), num_items_in_batch=count).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_loss_keywords_are_passed_on_as_in_the_official_class():
    labels = tokens().masked_fill(torch.arange(20) < 7, -1)
    ours, official = pair()
    losses = [model(tokens(), labels=labels, ignore_index=-1).loss for model in (ours, official)]
    assert torch.equal(*losses)
    fused = ours(tokens(), shift_labels=labels.roll(-1, 1).masked_fill(torch.arange(20) == 19, -1), ignore_index=-1)
    torch.testing.assert_close(fused.loss, losses[0], rtol=1e-6, atol=0)
    seen = {}
    ours.loss_function = lambda logits, labels, **options: seen.update(options) or logits.sum()
    ours(tokens(), labels=tokens(), ignore_index=-1)
    assert seen["ignore_index"] == -1


def test_loss_arguments_that_transformers_ignores_are_refused():
    with pytest.raises(TypeError, match="unexpected argument 'label_smoothing'"):
        tiny()(tokens(), labels=tokens(), label_smoothing=0.1)


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", CLASSES)
def test_input_ids_come_first_and_are_the_main_input(model_class):
    names = list(inspect.signature(model_class.forward).parameters)
    assert names[:2] == ["self", "input_ids"]
    assert model_class.main_input_name == "input_ids"


def test_arguments_have_the_names_of_the_official_causal_model():
    official = set(inspect.signature(GPT2LMHeadModel.forward).parameters)
    ours = set(inspect.signature(GPT2ScratchForCausalLM.forward).parameters)
    refused = {"token_type_ids", "encoder_hidden_states", "encoder_attention_mask"}
    assert official - ours <= refused | {"cache_position", "output_attentions", "output_hidden_states", "return_dict"}


def test_a_row_gives_the_same_result_in_any_batch():
    model, input_ids = tiny(), tokens(4)
    together = model(input_ids).logits
    for row in range(4):
        # Matrix products of another shape may sum in another order.
        torch.testing.assert_close(model(input_ids[row : row + 1]).logits[0], together[row], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(input_ids).logits, together)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_four_dimensional_mask_is_used_unchanged(attn_implementation):
    model, input_ids = tiny(attn_implementation=attn_implementation), tokens(1)
    allowed = torch.ones(20, 20).tril().bool()
    allowed[10:, :10] = False  # two documents
    mask = torch.zeros(1, 1, 20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)
    position_ids = torch.arange(20).unsqueeze(0) % 10
    found = model(input_ids, attention_mask=mask, position_ids=position_ids).logits
    expected = torch.cat([model(part).logits for part in input_ids.split(10, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_attend_to_each_other(attn_implementation):
    model, input_ids = tiny(attn_implementation=attn_implementation), tokens(1)
    position_ids = torch.cat([torch.arange(13), torch.arange(7)]).unsqueeze(0)
    found = model(input_ids, position_ids=position_ids, use_cache=False).logits
    expected = torch.cat([model(part).logits for part in input_ids.split([13, 7], dim=1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flex_attention"])
def test_attention_implementation_can_be_changed_in_a_loaded_model(attn_implementation, monkeypatch):
    model, input_ids = tiny(), tokens()
    expected = model(input_ids).logits
    model.set_attn_implementation(attn_implementation)
    assert model.config._attn_implementation == model.transformer.config._attn_implementation == attn_implementation

    def refuse(*_, **__):
        raise AssertionError("eager attention is still in use")

    monkeypatch.setattr(modeling_gpt2_scratch, "eager_attention", refuse)
    # Without compilation flex_attention warns. It has no gradients on a CPU.
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_works_if_installed_and_is_named_in_the_error_otherwise():
    assert GPT2ScratchForCausalLM._supports_flash_attn
    if torch.cuda.is_available():
        pytest.skip("with a GPU this depends on the installed packages")
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        tiny(attn_implementation="flash_attention_2")


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="toaster"):
        tiny(attn_implementation="toaster")


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", CLASSES)
def test_every_parameter_is_trained(model_class):
    model = build(model_class).train()
    out = model(tokens(), labels=tokens()[:, 0] % 2) if "Classification" in model_class.__name__ else model(tokens())
    (out[0] ** 2).mean().backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


def test_embeddings_can_be_read_and_replaced():
    model = build(GPT2ScratchForCausalLM)
    assert model.get_input_embeddings() is model.transformer.wte
    assert model.get_output_embeddings() is model.lm_head
    embedding = nn.Embedding(10, 32)
    model.set_input_embeddings(embedding)
    assert model.transformer.wte is embedding
    head = nn.Linear(32, 10, bias=False)
    model.set_output_embeddings(head)
    assert model.lm_head is head


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("size", [110, 60])
def test_vocabulary_can_grow_and_shrink_tied_or_not(size, tie_word_embeddings, tmp_path):
    model = tiny(tie_word_embeddings=tie_word_embeddings, eos_token_id=1, bos_token_id=1)
    before = model.state_dict()["lm_head.weight"].clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(97, size)
    assert torch.equal(model.lm_head.weight[:kept], before[:kept])
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_word_embeddings
    assert model.config.vocab_size == model.lm_head.out_features == size
    assert model(tokens() % size, labels=tokens() % size).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tokens() % size).logits, model(tokens() % size).logits)


def test_new_tokens_start_near_the_mean_of_the_old_ones():
    model = tiny()
    mean = model.transformer.wte.weight.mean(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(101)
    torch.testing.assert_close(model.transformer.wte.weight[97:], mean.expand(4, -1), rtol=0.1, atol=0.01)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pdrop", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_dropout_does_nothing_in_evaluation(model_class, pdrop, attn_implementation):
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": attn_implementation}
    expected = build(model_class, **none)(tokens())[0]
    model = build(model_class, **none | {pdrop: 0.5})
    assert torch.equal(model(tokens())[0], expected)
    assert not torch.equal(model.train()(tokens())[0], expected)


def test_half_precision_model_computes_in_half_precision():
    model = tiny().bfloat16()
    out = model(tokens(), labels=tokens(), output_hidden_states=True)
    assert {state.dtype for state in out.hidden_states} == {out.logits.dtype} == {torch.bfloat16}
    assert out.loss.dtype == torch.float32


def test_model_can_be_pickled_and_stays_tied():
    model = tiny()
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(copy(tokens()).logits, model(tokens()).logits)
    assert copy.lm_head.weight is copy.transformer.wte.weight


@pytest.mark.parametrize("model_class", CLASSES)
def test_model_on_the_meta_device_allocates_nothing(model_class):
    with torch.device("meta"):
        model = model_class(GPT2ScratchConfig(n_layer=48, n_head=25, n_embd=1600))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not list(model.buffers())


@pytest.mark.parametrize("model_class", CLASSES)
def test_model_from_the_meta_device_can_be_initialized_on_another(model_class):
    with torch.device("meta"):
        model = model_class(GPT2ScratchConfig(**TINY))
    model.to_empty(device="cpu")
    model.tie_weights()
    model.init_weights()
    for name, parameter in model.named_parameters():
        std = 0.02 / 6**0.5 if name.endswith("c_proj.weight") else 0.02
        if name.endswith("bias") or "ln_" in name:
            assert (parameter == float("ln_" in name and name.endswith("weight"))).all(), name
        else:
            # At least 64 draws: their standard deviation has a relative error near 1 / sqrt(2 * 64) = 9 %.
            assert parameter.std().item() == pytest.approx(std, rel=0.3), name


def test_vocabulary_can_grow_to_a_multiple():
    model = tiny()
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size == model.lm_head.out_features == 128


def test_weights_can_be_saved_from_another_state_dict(tmp_path):
    model, other = tiny(), tiny(initializer_range=0.1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in other.state_dict().items())


def test_activation_checkpointing_can_be_turned_off_again():
    model = tiny().train()
    name = "activation_checkpointing"
    name = name if hasattr(model, f"{name}_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")()
    assert cache_of(model(tokens(), use_cache=True)) is None
    getattr(model, f"{name}_disable")()
    assert cache_of(model(tokens(), use_cache=True)) is not None
