"""Log-likelihoods: against a forward pass by hand, whatever the batches, the processes and the sharing of prefixes."""

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import one_thread, pair, tiny  # noqa: F401 - a fixture

from evaluation.forward import TOKENS_PER_SCORED_TOKEN, ForwardPasses, Passage
from evaluation.items import Generation, Item, Request
from evaluation.scoring import n_positions_of, score
from gpt2_scratch_errors import InputError

PROBES = 3  # short forward passes before the first item
TOLERANCE = 1e-4  # what the project promises; fp32 sums in another order differ by about 1e-5


def random_items(seed=0, count=12, longest=40):
    """Questions with one to five candidates whose continuations begin alike as often as not."""
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(96) for _ in range(rng.randint(low, high)))

    items = []
    for index in range(count):
        context, common = ids(1, longest - 15), ids(0, 5)
        requests = tuple(Request(context, common + ids(1, 9)) for _ in range(rng.choice([1, 2, 5])))
        items.append(Item(index, requests))
    return items


def by_hand(model, request):
    """The definition: one sequence, all its logits, no cache."""
    ids = (request.context + request.continuation)[-(n_positions_of(model) + 1) :]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    targets = torch.tensor(ids[1:])
    count = len(request.continuation)
    chosen = log_probabilities.gather(1, targets[:, None])[-count:, 0]
    return float(chosen.double().sum()), bool((log_probabilities.argmax(-1) == targets)[-count:].all())


def assert_equal_by_hand(model, items, answers):
    for item, found in zip(items, answers, strict=True):
        for request, answer in zip(item.requests, found, strict=True):
            expected, greedy = by_hand(model, request)
            assert answer.sum == pytest.approx(expected, abs=TOLERANCE)
            assert (answer.tokens, answer.greedy) == (len(request.continuation), greedy)


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [1, 150, 100_000])
def test_log_likelihoods_are_those_of_a_forward_pass_by_hand(share_prefixes, tokens_per_batch):
    model, items = tiny(), random_items()
    answers = score(model, items, tokens_per_batch=tokens_per_batch, share_prefixes=share_prefixes)
    assert_equal_by_hand(model, items, answers)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_the_official_class_is_scored_like_ours(attn_implementation):
    ours, official = pair(attn_implementation)
    items = random_items(seed=1)
    assert_equal_by_hand(ours, items, score(official, items, tokens_per_batch=300))


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
    "roberta": {  # its positions begin behind the pad's
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
def test_models_of_other_families_are_scored_like_by_hand(family):
    model = of_family(family)
    items = random_items(seed=2)
    assert_equal_by_hand(model, items, score(model, items, tokens_per_batch=300))


@pytest.mark.parametrize("kind", ["candidates", "a single text", "writing"])
def test_a_model_that_sees_later_tokens_is_refused(kind):
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SIZES, intermediate_size=64, initializer_range=0.3)).eval()
    context = tuple(range(20))
    requests = {
        "candidates": (Request(context, (1, 2)), Request(context, (3, 2))),
        "a single text": (Request(context, (1, 2)),),
        "writing": (Generation(context, 4),),
    }
    with pytest.raises(InputError, match="expected a causal language model"):
        score(model, [Item(0, requests[kind])])


def test_prefixes_are_not_shared_where_the_cache_forgets():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    items = random_items(seed=3)
    assert_equal_by_hand(model, items, score(model, items, tokens_per_batch=300))


def test_what_a_model_does_to_its_logits_behind_the_head_is_kept():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.3, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    items = random_items(seed=4)
    assert_equal_by_hand(model, items, score(model, items))


def test_contexts_that_are_too_long_are_cut_from_the_left():
    model = tiny()
    items = random_items(seed=5, longest=90)
    assert any(len(request.context) > 48 for item in items for request in item.requests)
    assert_equal_by_hand(model, items, score(model, items, tokens_per_batch=500))


def test_order_of_the_items_does_not_matter():
    model, items = tiny(), random_items(seed=6)
    forwards = score(model, items, tokens_per_batch=200)
    backwards = score(model, items[::-1], tokens_per_batch=200)[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert [a.sum for a in one] == pytest.approx([a.sum for a in other], abs=TOLERANCE)


def test_the_head_sees_only_positions_that_are_scored():
    model = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    context = tuple(range(30))
    score(model, [Item(0, (Request(context, (1, 2, 3)), Request(context, (4, 5))))])
    # One position of the prefix scores both first tokens; then two, and one.
    assert [shape[1] for shape in seen[PROBES:]] == [1, 3]


@pytest.mark.parametrize("number", [0, 1])
def test_the_last_mlp_sees_only_positions_that_are_scored(number):
    model = pair("sdpa", activation_function="gelu_new")[number]
    read = []
    for block in model.transformer.h:
        block.mlp.c_fc.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    request = Request(tuple(range(30)), (1, 2, 3))
    assert_equal_by_hand(model, [Item(0, (request,))], score(model, [Item(0, (request,))]))
    read = read[PROBES * len(model.transformer.h) :]
    assert read[:3] == [32, 32, 3]
    assert read[3:] == [32, 32, 32]  # by hand, and so by everybody else afterwards


def test_the_activation_of_gpt2_is_one_kernel_while_a_model_is_scored(monkeypatch):
    official = pair("sdpa", activation_function="gelu_new")[1]
    calls = []
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(
        torch.nn.functional, "gelu", lambda *args, **kwargs: (calls.append(kwargs), gelu(*args, **kwargs))[1]
    )
    score(official, random_items(count=1), share_prefixes=False)
    assert calls == [{"approximate": "tanh"}] * 3
    assert not [module for module in official.modules() if "forward" in vars(module)]


def test_an_activation_that_somebody_has_wrapped_is_left_alone():
    official = pair("sdpa", activation_function="gelu_new")[1]
    activation, calls = official.transformer.h[0].mlp.act, []
    own = activation.forward
    activation.forward = wrapped = lambda x: (calls.append(1), own(x))[1]
    score(official, random_items(count=1), share_prefixes=False)
    assert calls
    assert activation.forward is wrapped


@pytest.mark.parametrize("family", ["ours", "official", "llama", "roberta"])
def test_a_long_text_is_scored_in_pieces(family, monkeypatch):
    monkeypatch.setattr("evaluation.forward._MOST_SCORED_OF_ONE_TEXT", 7)
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
    assert max(shapes[PROBES:]) <= 7
    assert_equal_by_hand(model, items, found)


def test_the_prefix_is_read_once():
    model = tiny()
    read = []
    model.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0].shape), with_kwargs=True
    )
    context = tuple(range(30))
    score(model, [Item(0, tuple(Request(context, (token, 7)) for token in range(10)))])
    assert read[PROBES:] == [(1, 30), (10, 1)]


@pytest.mark.parametrize("budget", [30, 90, 10_000])
def test_passes_cost_least_of_all_that_memory_allows(budget):
    passes, rng = ForwardPasses(tiny()), random.Random(budget)
    lengths = {key: rng.randint(1, 40) for key in range(9)}
    passages = [Passage(tuple(range(length + 1)), length) for length in lengths.values()]

    def cost(batches):
        return sum(passes.tokens_per_pass + len(batch) * lengths[batch[0]] for batch in batches)

    def fits(batch):
        scored = len(batch) <= budget // TOKENS_PER_SCORED_TOKEN
        return len(batch) == 1 or (len(batch) * (5 + lengths[batch[0]]) <= budget and scored)

    order = sorted(lengths, key=lengths.__getitem__, reverse=True)
    cheapest = min(
        cost(batches)
        for cuts in itertools.product([False, True], repeat=len(order) - 1)
        for places in [[0, *(place for place, cut in enumerate(cuts, 1) if cut), len(order)]]
        if all(map(fits, batches := [order[a:b] for a, b in itertools.pairwise(places)]))
    )
    found = passes._batches(passages, lengths, budget, cached=5)
    assert [key for batch in found for key in batch] == order
    assert all(map(fits, found))
    assert cost(found) == cheapest


def test_excluded_tokens_are_passed_over_by_the_greedy_choice():
    model = tiny()
    with torch.no_grad():
        first, second = model(torch.tensor([[3, 4, 5]])).logits[0, -1].topk(2).indices.tolist()
    requests = (
        Request((3, 4, 5), (second,)),
        Request((3, 4, 5), (second,), excluded=frozenset([first])),
        Request((3, 4, 5), (first,), excluded=frozenset([first])),
    )
    found = score(model, [Item(0, requests)])[0]
    assert [answer.greedy for answer in found] == [False, True, False]
    assert found[0].sum == pytest.approx(found[1].sum)


def test_generation_is_the_models_own_greedy_one():
    model = tiny()
    contexts = [tuple(range(1, length)) for length in (4, 21, 12)]  # 0, the pad, would be masked
    items = [Item(index, (Generation(context, 5),)) for index, context in enumerate(contexts)]
    for context, [answer] in zip(contexts, score(model, items), strict=True):
        expected = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = expected[0, len(context) :].tolist()
        assert list(answer.ids) == (expected[: expected.index(96)] if 96 in expected else expected)


def test_generation_behind_a_context_that_is_too_long_reads_its_end():
    model = tiny()
    context = tuple(place % 90 for place in range(100))
    long, short = score(model, [Item(0, (Generation(context, 5),)), Item(1, (Generation(context[-43:], 5),))])
    assert long[0] == short[0]


def test_generation_does_not_depend_on_what_is_generated_beside_it():
    model = tiny()
    context = tuple(place % 90 for place in range(100))  # cut to leave room for what is generated
    item, beside = Item(0, (Generation(context, 8),)), Item(1, (Generation(context, 30),))
    assert score(model, [item, beside])[0] == score(model, [item])[0]
    assert score(model, [item, beside])[1] == score(model, [beside])[0]


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_running_out_of_memory_halves_the_budget_and_goes_on(share_prefixes):
    model, items = tiny(), random_items(seed=7)
    expected = score(model, items, share_prefixes=share_prefixes)
    sizes = []

    def limited(module, args, kwargs):
        sizes.append(args[0].numel())
        if sizes[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.transformer.register_forward_pre_hook(limited, with_kwargs=True)
    found = score(model, items, tokens_per_batch=4_000, share_prefixes=share_prefixes)
    handle.remove()
    assert max(sizes) > 60
    for one, other in zip(found, expected, strict=True):
        assert [a.sum for a in one] == pytest.approx([a.sum for a in other], abs=TOLERANCE)


def test_memory_that_does_not_suffice_for_a_single_sequence_is_an_error():
    model = tiny()

    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.transformer.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        score(model, random_items(count=2))


def test_every_item_is_reported_once_as_it_is_done():
    model, items = tiny(), random_items(seed=8)
    reported = {}
    answers = score(
        model, items, tokens_per_batch=200, on_result=lambda item, found: reported.update({item.index: found})
    )
    assert [reported[item.index] for item in items] == answers


def test_nothing_to_score_is_no_mistake():
    assert score(tiny(), []) == []


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training():
    model, items = tiny(resid_pdrop=0.5), random_items(count=2)
    expected = score(model, items)
    model.train()
    model.transformer.h[1].eval()  # somebody's choice
    before = [module.training for module in model.modules()]
    assert score(model, items) == expected
    assert [module.training for module in model.modules()] == before


def test_nan_is_told_with_its_item():
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(InputError, match=r"found NaN at item \d+"):
        score(model, random_items(count=3))


def test_nan_is_told_where_a_model_writes_too():
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(InputError, match="found NaN at item 7"):
        score(model, [Item(7, (Generation((1, 2, 3), 4),))])


def test_a_probability_of_zero_is_told():
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor(5), -torch.inf))
    with pytest.raises(InputError, match="infinite log-likelihoods at item 0"):
        score(model, [Item(0, (Request((1, 2), (5,)),))])


def test_a_models_own_wishes_for_generation_are_left_out():
    model = tiny()
    item = Item(0, (Generation(tuple(range(1, 9)), 6),))
    expected = score(model, [item])
    wishes = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 3.0, "min_new_tokens": 6, "top_k": 2}
    model.generation_config.update(**wishes)
    before = model.generation_config.to_dict()
    assert score(model, [item]) == expected
    assert model.generation_config.to_dict() == before


def test_a_token_outside_the_vocabulary_is_told():
    with pytest.raises(InputError, match=r"below the model's vocabulary size 97, found 97 at item 4"):
        score(tiny(), [Item(4, (Request((1,), (97,)),))])


def test_a_continuation_longer_than_the_positions_is_told():
    with pytest.raises(InputError, match=r"at most 48 tokens .*, found one that needs 49 at item 0"):
        score(tiny(), [Item(0, (Request((1,), (2,) * 49),))])
    assert score(tiny(), [Item(0, (Request((1,), (2,) * 48),))])[0][0].tokens == 48


class Process:
    """One of several processes, as `score` knows them."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def on_processes(count, monkeypatch, run):
    """Run `run(accelerator)` in as many threads as if they were processes, and return what each returns or raises."""
    barrier, values = threading.Barrier(count, timeout=60), [None] * count

    def gather(value, accelerator):
        barrier.wait()
        values[accelerator.process_index] = value
        barrier.wait()
        return list(values)

    monkeypatch.setattr("evaluation.scoring._gather", gather)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run, Process(index, count)) for index in range(count)]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_gives_the_same_answers(count, monkeypatch):
    items = random_items(seed=9, count=7)
    expected = score(tiny(), items, tokens_per_batch=200)
    reported = {index: [] for index in range(count)}
    models = [tiny() for _ in range(count)]

    def run(accelerator):
        told = reported[accelerator.process_index]
        return score(
            models[accelerator.process_index],
            items,
            accelerator=accelerator,
            tokens_per_batch=200,
            on_result=lambda item, answers: told.append(item.index),
        )

    for found in on_processes(count, monkeypatch, run):
        for one, other in zip(found, expected, strict=True):
            assert [a.sum for a in one] == pytest.approx([a.sum for a in other], abs=TOLERANCE)
    assert sorted(reported.pop(0)) == list(range(7))
    assert not any(reported.values())


def test_a_mistake_that_one_process_meets_ends_all_of_them(monkeypatch):
    models = [tiny(), tiny()]
    with torch.no_grad():
        models[1].transformer.ln_f.weight[3] = torch.nan

    def run(accelerator):
        return score(models[accelerator.process_index], random_items(count=6), accelerator=accelerator)

    for error in on_processes(2, monkeypatch, run):
        assert isinstance(error, InputError)
        assert "NaN" in str(error)
