"""What scores are held against: the definition of a log-likelihood, worked out without any of the shortcuts."""

import random

import pytest
import torch

from evaluation.scoring.scorer import n_positions_of
from evaluation.tasks.task_types import Item, Request

PROBES = 2  # short forward passes before the first item
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
