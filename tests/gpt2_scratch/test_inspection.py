"""Probabilities, attention and logit lens equal what the model itself returns."""

import threading

import pytest
import torch
from support.tiny_models import one_thread, pair, tiny, tokens  # noqa: F401 - one_thread is a fixture

from gpt2_scratch.inspection import attention, layers, logit_lens, predictions, prepare, sample_tokens

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["ours", "official"])
def model(request):
    ours, official = pair("sdpa")
    return prepare(ours if request.param == "ours" else official)


def test_probabilities_are_the_models_own_and_alternatives_are_its_likeliest(model):
    ids = tokens(batch=1)
    with torch.no_grad():
        expected = model(ids).logits[0].softmax(-1)
    found = predictions(model, ids, top=5)
    for row in range(19):
        probability = float(expected[row, ids[0, row + 1]])
        assert float(found.probabilities[row]) == pytest.approx(probability, rel=1e-5)
        order = expected[row].argsort(descending=True).tolist()
        assert int(found.ranks[row]) == order.index(int(ids[0, row + 1])) + 1
        assert found.top_ids[row].tolist() == order[:5]
    assert len(found.top_ids) == 20  # also of the token after the text
    torch.testing.assert_close(found.top_probabilities, expected.topk(5).values)


def test_probabilities_of_all_tokens_sum_to_one(model):
    found = predictions(model, tokens(batch=1), top=97)
    torch.testing.assert_close(found.top_probabilities.sum(-1), torch.ones(20))


def test_a_single_token_has_no_probability_but_alternatives(model):
    found = predictions(model, tokens(batch=1, seq=1), top=3)
    assert found.probabilities.shape == (0,)
    assert found.top_ids.shape == (1, 3)


@pytest.mark.parametrize("layer", [0, 2])
def test_attention_equals_the_models_attentions_and_is_causal(model, layer):
    ids = tokens(batch=1)
    found = attention(layers(model, ids), layer)
    with torch.no_grad():
        assert torch.equal(found, model(ids, output_attentions=True).attentions[layer][0])
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 20))
    assert not found.triu(1).any()
    assert found.std() > 0.05  # not uniform


def test_attention_without_weights_is_refused():
    with pytest.raises(ValueError, match="set_attn_implementation"):
        layers(tiny(attn_implementation="sdpa"), tokens(batch=1))


def test_last_row_of_the_logit_lens_is_the_models_prediction(model):
    ids = tokens(batch=1)
    lens = logit_lens(model, layers(model, ids), slice(3, 9))
    assert lens.shape == (4, 6, 97)
    with torch.no_grad():
        torch.testing.assert_close(lens[-1], model(ids).logits[0, 3:9].softmax(-1))


def test_lower_rows_of_the_logit_lens_are_the_prediction_without_the_blocks_above():
    model = prepare(tiny())
    ids = tokens(batch=1)
    lens = logit_lens(model, layers(model, ids), slice(None))
    blocks = model.transformer.h
    for n_layer in (0, 1, 2):
        model.transformer.h = blocks[:n_layer]
        with torch.no_grad():
            torch.testing.assert_close(lens[n_layer], model(ids, use_cache=False).logits[0].softmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
    ],
)
def test_sampled_tokens_are_those_of_generate_with_the_same_seed(model, settings):
    ids = tokens(batch=1, seq=5)
    found = list(sample_tokens(model, ids, max_new_tokens=20, seed=7, **settings))
    if settings["temperature"] == 0:
        options = {"do_sample": False}
    else:
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, **settings}
    torch.manual_seed(7)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, pad_token_id=0, **options)
    assert found == expected[0, 5:].tolist()
    assert len(set(found)) > 3


def test_sampling_stops_at_the_end_of_text_and_at_the_last_position(model):
    ids = tokens(batch=1, seq=40)
    everything = list(sample_tokens(model, ids, max_new_tokens=100, temperature=0))
    assert len(everything) == 8
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, everything[2]
    try:
        stopped = list(sample_tokens(model, ids, max_new_tokens=100, temperature=0))
    finally:
        model.generation_config.eos_token_id = before
    assert stopped == everything[: everything.index(everything[2]) + 1]


def test_concurrent_users_get_what_they_would_get_alone():
    model = prepare(tiny())
    ids = [tokens(batch=1, seq=6, seed=seed) for seed in range(4)]

    def work(number):
        new = list(sample_tokens(model, ids[number], max_new_tokens=30, temperature=1.0, seed=number))
        text = torch.cat([ids[number], torch.tensor([new])], dim=1)
        computed = layers(model, text)
        return new, attention(computed, 1), logit_lens(model, computed, slice(0, 4))

    alone = [work(number) for number in range(4)]
    together = [None] * 4

    def run(number):
        together[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first, second in zip(alone, together, strict=True):
        assert first[0] == second[0]
        torch.testing.assert_close(first[1:], second[1:])
    assert len({tuple(new) for new, *_ in alone}) == 4


def test_another_architecture_is_refused():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=8))
    with pytest.raises(ValueError, match="shows GPT-2 language models; GPTNeoXForCausalLM is of type gpt_neox"):
        prepare(neox)
