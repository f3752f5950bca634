"""The definition of a log-likelihood, computed without batches, cache or shared prefixes, to compare scores with."""

import random

import pytest
import torch

from evaluation.scoring.scorer import n_positions_of
from evaluation.tasks.task_types import Item, Request

CHECKS = 2  # forward passes that check the model before the first item
TOLERANCE = 1e-4  # as documented; fp32 sums in another order differ by about 1e-5


def random_items(seed=0, count=12, longest=40):
    """Items with one, two or five requests; most continuations of an item begin with the same tokens."""
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(96) for _ in range(rng.randint(low, high)))

    items = []
    for index in range(count):
        context, common = ids(1, longest - 15), ids(0, 5)
        requests = tuple(Request(context, common + ids(1, 9)) for _ in range(rng.choice([1, 2, 5])))
        items.append(Item(index, requests))
    return items


def scored_by_hand(model, request):
    """Log-likelihood and greediness of one request, from all logits of one sequence."""
    ids = (request.context + request.continuation)[-(n_positions_of(model) + 1) :]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    targets = torch.tensor(ids[1:])
    count = len(request.continuation)
    chosen = log_probabilities.gather(1, targets[:, None])[-count:, 0]
    return float(chosen.double().sum()), bool((log_probabilities.argmax(-1) == targets)[-count:].all())


def assert_scored_as_by_hand(model, items, scores):
    for item, found in zip(items, scores, strict=True):
        for request, score in zip(item.requests, found, strict=True):
            expected, greedy = scored_by_hand(model, request)
            assert score.sum == pytest.approx(expected, abs=TOLERANCE)
            assert (score.tokens, score.greedy) == (len(request.continuation), greedy)
