"""Batches of sequences: the cheapest ones that fit into memory."""

import itertools
import random

import pytest

from evaluation.scoring.forward_passes import TOKENS_PER_SCORED_TOKEN, cheapest_batches


@pytest.mark.parametrize("budget", [30, 90, 10_000])
def test_batches_are_the_cheapest_that_fit_into_memory(budget):
    rng = random.Random(budget)
    lengths = {key: rng.randint(1, 40) for key in range(9)}

    def cost(batches):
        return sum(64 + len(batch) * lengths[batch[0]] for batch in batches)

    def fits(batch):
        scored = len(batch) <= budget // TOKENS_PER_SCORED_TOKEN
        return len(batch) == 1 or (len(batch) * (5 + lengths[batch[0]]) <= budget and scored)

    order = sorted(lengths, key=lengths.__getitem__, reverse=True)
    cheapest = min(
        cost(batches)
        for cuts in itertools.product([False, True], repeat=len(order) - 1)
        for bounds in [[0, *(index for index, cut in enumerate(cuts, 1) if cut), len(order)]]
        if all(map(fits, batches := [order[a:b] for a, b in itertools.pairwise(bounds)]))
    )
    found = cheapest_batches(lengths, dict.fromkeys(lengths, 1), budget=budget, cached=5, tokens_per_pass=64)
    assert [key for batch in found for key in batch] == order
    assert all(map(fits, found))
    assert cost(found) == cheapest
