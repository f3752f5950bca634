"""Which sequences share a forward pass."""

import math
from collections.abc import Mapping

TOKENS_PER_SCORED_TOKEN = 8
"""Tokens whose keys, values and activations take about as much memory as the logits of one token."""


def cheapest_batches(
    lengths: Mapping[int, int], scored: Mapping[int, int], *, budget: int, cached: int, tokens_per_pass: int
) -> list[list[int]]:
    """Return the keys of `lengths`, longest first, in the batches that take the least time and fit into memory.

    Dynamic programming over the sorted lengths: a pass over n sequences costs n times the longest one, padding
    included, and a constant.

    Args:
        lengths: tokens to read of each sequence.
        scored: tokens to score of each sequence.
        budget: tokens in a pass, padding and cached ones included.
        cached: tokens of each sequence that are in the cache already.
        tokens_per_pass: the constant cost of a pass, in tokens.
    """
    keys = sorted(lengths, key=lengths.__getitem__, reverse=True)
    costs, starts = [0], [0]  # of the first n sequences: their cost, and where their last batch starts
    for end in range(1, len(keys) + 1):
        cheapest, cheapest_start, logits = math.inf, end - 1, 0
        for start in range(end - 1, -1, -1):
            rows, longest = end - start, lengths[keys[start]]
            logits += scored[keys[start]]
            too_much = rows * (cached + longest) > budget or logits * TOKENS_PER_SCORED_TOKEN > budget
            if too_much and rows > 1:
                break
            cost = costs[start] + tokens_per_pass + rows * longest
            if cost < cheapest:
                cheapest, cheapest_start = cost, start
        costs.append(int(cheapest))
        starts.append(cheapest_start)
    batches, end = [], len(keys)
    while end:
        batches.append(keys[starts[end] : end])
        end = starts[end]
    return batches[::-1]
