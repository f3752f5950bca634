"""Scores equal a forward pass by hand, whatever the batch size, the processes and the sharing of prefixes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.scored_by_hand import TOLERANCE, assert_scored_as_by_hand, random_items
from support.tiny_models import one_thread, pair, tiny  # noqa: F401 - a fixture

from common.cli_errors import InputError
from evaluation.scoring.scorer import score, score_batches
from evaluation.tasks.task_types import Generation, Item, Request

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("tokens_per_batch", [1, 150, 100_000])
def test_log_likelihoods_equal_a_forward_pass_by_hand(share_prefixes, tokens_per_batch):
    model, items = tiny(), random_items()
    scores = score(model, items, tokens_per_batch=tokens_per_batch, share_prefixes=share_prefixes)
    assert_scored_as_by_hand(model, items, scores)


def test_contexts_that_are_too_long_are_truncated_on_the_left():
    model = tiny()
    items = random_items(seed=5, longest=90)
    assert any(len(request.context) > 48 for item in items for request in item.requests)
    assert_scored_as_by_hand(model, items, score(model, items, tokens_per_batch=500))


def test_order_of_items_does_not_matter():
    model, items = tiny(), random_items(seed=6)
    forwards = score(model, items, tokens_per_batch=200)
    backwards = score(model, items[::-1], tokens_per_batch=200)[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert [a.sum for a in one] == pytest.approx([a.sum for a in other], abs=TOLERANCE)


def test_greedy_choice_ignores_excluded_tokens():
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


def test_generation_equals_the_models_own_greedy_generation():
    model = tiny()
    contexts = [tuple(range(1, length)) for length in (4, 21, 12)]  # not 0, the pad token, which would be masked
    items = [Item(index, (Generation(context, 5),)) for index, context in enumerate(contexts)]
    for context, [answer] in zip(contexts, score(model, items), strict=True):
        expected = model.generate(torch.tensor([context]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = expected[0, len(context) :].tolist()
        assert list(answer.ids) == (expected[: expected.index(96)] if 96 in expected else expected)


def test_generation_reads_the_end_of_a_context_that_is_too_long():
    model = tiny()
    context = tuple(index % 90 for index in range(100))
    long, short = score(model, [Item(0, (Generation(context, 5),)), Item(1, (Generation(context[-43:], 5),))])
    assert long[0] == short[0]


def test_generation_does_not_depend_on_other_items():
    model = tiny()
    context = tuple(index % 90 for index in range(100))  # truncated to leave room for the new tokens
    item, other = Item(0, (Generation(context, 8),)), Item(1, (Generation(context, 30),))
    assert score(model, [item, other])[0] == score(model, [item])[0]
    assert score(model, [item, other])[1] == score(model, [other])[0]


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_out_of_memory_halves_the_batch_size(share_prefixes):
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


def test_out_of_memory_with_a_single_sequence_is_an_error():
    model = tiny()

    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.transformer.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        score(model, random_items(count=2))


def test_every_item_is_in_one_batch():
    model, items = tiny(), random_items(seed=8)
    batches = list(score_batches(model, items, tokens_per_batch=200))
    assert len(batches) > 1
    assert sorted(index for batch in batches for index, _ in batch) == list(range(len(items)))


def test_closing_the_batches_early_restores_training_mode():
    model = tiny().train()
    batches = score_batches(model, random_items(seed=8), tokens_per_batch=200)
    next(batches)
    assert not model.training
    batches.close()
    assert model.training


def test_no_items_have_no_scores():
    assert score(tiny(), []) == []


def test_model_in_training_mode_is_scored_without_dropout_and_stays_in_training_mode():
    model, items = tiny(resid_pdrop=0.5), random_items(count=2)
    expected = score(model, items)
    model.train()
    model.transformer.h[1].eval()  # frozen by the user
    before = [module.training for module in model.modules()]
    assert score(model, items) == expected
    assert [module.training for module in model.modules()] == before


def test_error_names_the_item_with_nan():
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(InputError, match=r"NaN at item \d+"):
        score(model, random_items(count=3))


def test_error_names_the_item_with_nan_in_a_generation():
    model = tiny()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(InputError, match="NaN at item 7"):
        score(model, [Item(7, (Generation((1, 2, 3), 4),))])


def test_probability_of_zero_is_an_error():
    model = tiny()
    model.lm_head.register_forward_hook(lambda module, args, output: output.index_fill(-1, torch.tensor(5), -torch.inf))
    with pytest.raises(InputError, match="a probability of 0 at item 0"):
        score(model, [Item(0, (Request((1, 2), (5,)),))])


def test_generation_config_of_the_model_is_ignored_and_kept():
    model = tiny()
    item = Item(0, (Generation(tuple(range(1, 9)), 6),))
    expected = score(model, [item])
    config = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 3.0, "min_new_tokens": 6, "top_k": 2}
    model.generation_config.update(**config)
    before = model.generation_config.to_dict()
    assert score(model, [item]) == expected
    assert model.generation_config.to_dict() == before


def test_token_outside_the_vocabulary_is_refused():
    with pytest.raises(InputError, match="item 4 has token id 97, but the model's vocabulary size is 97"):
        score(tiny(), [Item(4, (Request((1,), (97,)),))])


def test_continuation_longer_than_the_positions_is_refused():
    with pytest.raises(InputError, match="item 0 needs 49 tokens, but the model has 48 positions"):
        score(tiny(), [Item(0, (Request((1,), (2,) * 49),))])
    assert score(tiny(), [Item(0, (Request((1,), (2,) * 48),))])[0][0].tokens == 48


class Process:
    """The attributes of an accelerator that `score` uses."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def on_processes(count, monkeypatch, run):
    """Run `run(accelerator)` in `count` threads that act as processes, and return what each returns or raises."""
    barrier, values, thread = threading.Barrier(count, timeout=60), [None] * count, threading.local()

    def gather_object(objects):
        barrier.wait()
        [values[thread.index]] = objects
        barrier.wait()
        return list(values)

    def run_as(index):
        thread.index = index
        return run(Process(index, count))

    monkeypatch.setattr("evaluation.scoring.scorer.gather_object", gather_object)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(run_as, index) for index in range(count)]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_gives_the_same_scores(count, monkeypatch):
    items = random_items(seed=9, count=7)
    expected = score(tiny(), items, tokens_per_batch=200)
    models = [tiny() for _ in range(count)]

    def run(accelerator):
        return score(models[accelerator.process_index], items, accelerator=accelerator, tokens_per_batch=200)

    for found in on_processes(count, monkeypatch, run):
        for one, other in zip(found, expected, strict=True):
            assert [a.sum for a in one] == pytest.approx([a.sum for a in other], abs=TOLERANCE)


def test_error_on_one_process_is_raised_on_all_processes(monkeypatch):
    models = [tiny(), tiny()]
    with torch.no_grad():
        models[1].transformer.ln_f.weight[3] = torch.nan

    def run(accelerator):
        return score(models[accelerator.process_index], random_items(count=6), accelerator=accelerator)

    for error in on_processes(2, monkeypatch, run):
        assert isinstance(error, InputError)
        assert "NaN" in str(error)
