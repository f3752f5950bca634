"""Parity of `generate()` with the official class, token for token, in every mode."""

import pytest
import torch
from support.tiny_models import cache_of, given, one_thread, padded, pair, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

pytestmark = pytest.mark.parity

GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 12},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


def generate(model, batch, **options):
    torch.manual_seed(3)
    return model.generate(**batch, max_new_tokens=15, pad_token_id=96, **options)


def left_padded(rows=3):
    batch = padded("left")
    return {name: batch[name][:rows] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("way", GENERATION)
def test_generation_equals_the_official_one_token_for_token(way, attn_implementation):
    batch = left_padded(1 if way == "prompt lookup" else 3)
    ours, official = (generate(model, batch, **GENERATION[way]) for model in pair(attn_implementation))
    assert torch.equal(ours, official)
    assert ours.shape[1] > 20


def compile_everywhere():
    """generate() compiles its steps on GPUs only, unless this asks for it."""
    config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager", dynamic=True)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "assisted", "compiled"])
def test_cached_generation_equals_uncached_generation_and_the_official_one(way):
    ours, official = pair("sdpa")
    batch = left_padded(1 if way == "assisted" else 3)
    options = {"do_sample": False, **({"num_beams": 4} if way == "beams" else {})}
    ways = {
        "static": lambda: {"cache_implementation": "static", "disable_compile": True},
        "assisted": lambda: {"assistant_model": tiny(n_layer=1)},
        "compiled": lambda: {"cache_implementation": "static", "compile_config": compile_everywhere()},
    }
    torch._dynamo.reset()
    cached = generate(ours, batch, **options, **ways.get(way, dict)())
    if way == "compiled":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(cached, generate(ours, batch, **options, use_cache=False))
    assert torch.equal(cached, generate(official, batch, **options))


def test_scores_hidden_states_and_attentions_of_generation_equal_the_official_ones():
    wanted = dict.fromkeys(
        ("output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate"), True
    )
    ours, official = (generate(model, left_padded(), do_sample=False, **wanted) for model in pair())
    for name in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(ours[name], official[name], strict=True))
    for name in ("hidden_states", "attentions"):
        for one, other in zip(ours[name], official[name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert cache_of(ours).get_seq_length() == ours.sequences.shape[1] - 1


def test_left_padded_batch_generates_what_each_prompt_does_alone():
    model, batch = tiny(), left_padded()
    together = generate(model, batch, do_sample=False)
    for row, mask in enumerate(batch["attention_mask"]):
        alone = generate(model, {"input_ids": batch["input_ids"][row][mask.bool()].unsqueeze(0)}, do_sample=False)
        new = together[row, 20:]
        # A finished row is padded until the longest one is finished.
        assert torch.equal(new[: len(alone[0]) - int(mask.sum())], alone[0, int(mask.sum()) :])


def test_assisted_generation_equals_greedy_generation():
    model, input_ids = tiny(), tokens(1)
    for assistant in (tiny(n_layer=1), tiny()):
        found = generate(model, {"input_ids": input_ids}, do_sample=False, assistant_model=assistant)
        assert torch.equal(found, generate(model, {"input_ids": input_ids}, do_sample=False))


def test_assisted_generation_works_with_the_official_model_in_both_roles():
    ours, official = pair()
    batch = {"input_ids": tokens(1)}
    expected = generate(official, batch, do_sample=False)
    assert torch.equal(generate(ours, batch, do_sample=False, assistant_model=official), expected)
    assert torch.equal(generate(official, batch, do_sample=False, assistant_model=ours), expected)


class Collector(BaseStreamer):
    """Records what it receives."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamer_receives_prompt_and_every_new_token():
    streamer = Collector()
    text = generate(tiny(), {"input_ids": tokens(1)}, do_sample=False, streamer=streamer)
    assert streamer.tokens == text[0].tolist()
    assert streamer.ended


def test_generation_from_embeddings_equals_generation_from_ids():
    model, input_ids = tiny(), tokens()
    embeds = model.transformer.wte(input_ids)
    from_ids = generate(model, {"input_ids": input_ids}, do_sample=False)
    assert torch.equal(generate(model, {"inputs_embeds": embeds}, do_sample=False), from_ids[:, 20:])


def test_generation_continues_from_a_cache():
    model, input_ids = tiny(), tokens()
    complete = generate(model, {"input_ids": input_ids}, do_sample=False)
    first = model.generate(input_ids, max_new_tokens=5, pad_token_id=96, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(
        first.sequences,
        **given(cache_of(first)),
        max_new_tokens=complete.shape[1] - 25,
        pad_token_id=96,
        do_sample=False,
    )
    assert torch.equal(rest, complete)


def test_cache_has_the_documented_shape_and_can_be_cropped_and_reordered():
    model, input_ids = tiny(), tokens()
    cache = cache_of(model(input_ids, **given(DynamicCache(config=model.config))))
    assert len(cache) == 3
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 4, 20, 8)
    cache.crop(-8)
    after = model(input_ids[:, 12:], **given(cache)).logits
    torch.testing.assert_close(after, model(input_ids).logits[:, 12:], rtol=1e-4, atol=1e-4)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[2].keys[0], cache.layers[2].keys[1])


def test_generation_ends_at_the_end_of_text_token():
    model = tiny()
    text = generate(model, {"input_ids": tokens(1)}, do_sample=False)[0]
    end = text[23].item()
    short = generate(model, {"input_ids": tokens(1)}, do_sample=False, eos_token_id=end)[0]
    assert short.tolist() == text[: text.tolist().index(end, 20) + 1].tolist()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_past_n_positions_is_refused(cache, compiled):
    model = tiny(n_layer=1)
    if compiled:
        torch._dynamo.reset()
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    options = {"max_new_tokens": 40, "pad_token_id": 96, "do_sample": False, "eos_token_id": -1}
    with pytest.raises(ValueError, match="sequence of 49 tokens exceeds n_positions=48"):
        model.generate(tokens(seq=40), cache_implementation=cache, disable_compile=True, **options)


def test_left_padding_uses_no_positions():
    input_ids, mask = tokens(seq=50), torch.ones(2, 50, dtype=torch.long)
    mask[:, :20] = 0
    options = {"max_new_tokens": 10, "pad_token_id": 96, "do_sample": False, "eos_token_id": -1}
    padded_text = tiny().generate(input_ids, attention_mask=mask, **options)
    assert torch.equal(padded_text[:, 50:], tiny().generate(input_ids[:, 20:], **options)[:, 30:])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_continuous_batching_gives_the_tokens_of_generate(attn_implementation):
    model = tiny(attn_implementation=attn_implementation)
    prompts = [tokens(1, 5)[0].tolist(), tokens(1, 9, seed=2)[0].tolist()]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 96}
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # the default takes most of the free memory
    found = model.generate_batch(
        prompts, generation_config=GenerationConfig(**options), continuous_batching_config=memory
    )
    for prompt, result in zip(prompts, found.values(), strict=True):
        expected = model.generate(torch.tensor([prompt]), generation_config=GenerationConfig(**options))
        assert result.generated_tokens == expected[0, len(prompt) :].tolist()
