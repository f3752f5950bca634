"""Scores of models of many families, and how few positions the forward passes compute."""

import random

import pytest
import torch
from support.scored_by_hand import CHECKS, assert_scored_as_by_hand, random_items
from support.tiny_models import one_thread, pair, tiny  # noqa: F401 - a fixture

from common.cli_errors import InputError
from evaluation.scoring.scorer import score
from evaluation.tasks.task_types import Generation, Item, Request

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_official_model_gets_the_same_scores_as_ours(attn_implementation):
    ours, official = pair(attn_implementation)
    items = random_items(seed=1)
    assert_scored_as_by_hand(ours, items, score(official, items, tokens_per_batch=300))


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
FAMILIES = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {"intermediate_size": 64},
    "gptj": {"rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {"intermediate_size": 64},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {},
    "mixtral": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    "roberta": {  # its positions start after the pad token's
        "intermediate_size": 64,
        "is_decoder": True,
        "pad_token_id": 1,
        "max_position_embeddings": 52,
    },
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 6},
}


def of_family(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], "initializer_range": 0.3})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_other_families_are_scored_as_by_hand(family):
    model = of_family(family)
    items = random_items(seed=2)
    assert_scored_as_by_hand(model, items, score(model, items, tokens_per_batch=300))


@pytest.mark.parametrize("kind", ["candidates", "single text", "generation"])
def test_model_that_sees_later_tokens_is_refused(kind):
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SIZES, intermediate_size=64, initializer_range=0.3)).eval()
    context = tuple(range(20))
    requests = {
        "candidates": (Request(context, (1, 2)), Request(context, (3, 2))),
        "single text": (Request(context, (1, 2)),),
        "generation": (Generation(context, 4),),
    }
    with pytest.raises(InputError, match="not a causal language model"):
        score(model, [Item(0, requests[kind])])


def test_prefixes_are_not_shared_with_a_sliding_window_cache():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    items = random_items(seed=3)
    assert_scored_as_by_hand(model, items, score(model, items, tokens_per_batch=300))


def test_softcapping_after_the_head_is_kept():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    items = random_items(seed=4)
    assert_scored_as_by_hand(model, items, score(model, items))


def test_head_computes_only_scored_positions():
    model = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    context = tuple(range(30))
    score(model, [Item(0, (Request(context, (1, 2, 3)), Request(context, (4, 5))))])
    # One position of the prefix scores the first token of both continuations; then two and one remain.
    assert [shape[1] for shape in seen[CHECKS:]] == [1, 3]


def test_gelu_new_is_one_kernel_while_a_model_is_scored(monkeypatch):
    official = pair("sdpa", activation_function="gelu_new")[1]
    calls = []
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(
        torch.nn.functional, "gelu", lambda *args, **kwargs: (calls.append(kwargs), gelu(*args, **kwargs))[1]
    )
    score(official, random_items(count=1), share_prefixes=False)
    assert calls == [{"approximate": "tanh"}] * 3
    assert not [module for module in official.modules() if "forward" in vars(module)]


def test_wrapped_activation_is_left_alone():
    official = pair("sdpa", activation_function="gelu_new")[1]
    activation, calls = official.transformer.h[0].mlp.act, []
    own = activation.forward
    activation.forward = wrapped = lambda x: (calls.append(1), own(x))[1]
    score(official, random_items(count=1), share_prefixes=False)
    assert calls
    assert activation.forward is wrapped


@pytest.mark.parametrize("family", ["ours", "official", "llama", "roberta"])
def test_long_text_is_scored_in_pieces(family, monkeypatch):
    monkeypatch.setattr("evaluation.scoring.forward_passes._MAX_SCORED_AT_ONCE", 7)
    model = dict(zip(("ours", "official"), pair("sdpa"), strict=True)).get(family) or of_family(family)
    rng, shapes = random.Random(0), []
    items = [
        Item(
            index,
            (Request(tuple(rng.randrange(2, 96) for _ in range(before)), tuple(rng.choices(range(2, 96), k=size))),),
        )
        for index, (before, size) in enumerate([(1, 47), (9, 30), (20, 20), (3, 4)])
    ]
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    found = score(model, items, tokens_per_batch=48)
    assert max(shapes[CHECKS:]) <= 7
    assert_scored_as_by_hand(model, items, found)


def test_shared_prefix_is_read_once():
    model = tiny()
    read = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0].shape), with_kwargs=True
    )
    context = tuple(range(30))
    score(model, [Item(0, tuple(Request(context, (token, 7)) for token in range(10)))])
    assert read[CHECKS:] == [(1, 30), (10, 1)]
