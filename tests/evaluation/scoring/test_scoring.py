"""Log-likelihoods: against a forward pass by hand, whatever the batches, the processes and the sharing of prefixes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.scored_by_hand import TOLERANCE, assert_equal_by_hand, random_items
from support.tiny_models import one_thread, pair, tiny  # noqa: F401 - a fixture

from common.cli_errors import InputError
from evaluation.scoring.scorer import score
from evaluation.tasks.task_types import Generation, Item, Request


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [1, 150, 100_000])
def test_log_likelihoods_are_those_of_a_forward_pass_by_hand(share_prefixes, tokens_per_batch):
    model, items = tiny(), random_items()
    answers = score(model, items, tokens_per_batch=tokens_per_batch, share_prefixes=share_prefixes)
    assert_equal_by_hand(model, items, answers)


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

    monkeypatch.setattr("evaluation.scoring.scorer._gather", gather)
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
