"""Perplexity with its standard error and 95 % interval."""

import math
from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import Z, ratio_of_sums

_DESCRIPTION = """exp of the negative log-likelihood per token, word or other unit.

Returns `perplexity`, `stderr` (delta method over the items, where lm-evaluation-harness draws bootstrap samples; None
for a single item) and `interval` (exp of the loss's 95 % interval).
"""


class Perplexity(evaluate.Metric):
    """exp of the sum of losses over the sum of counts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: log-likelihoods in nats; references: their numbers of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        loss, stderr = ratio_of_sums([-value for value in predictions], references)
        perplexity = _exp(loss)
        if stderr is None:
            return {"perplexity": perplexity, "stderr": None, "interval": None}
        interval = [_exp(loss - Z * stderr), _exp(loss + Z * stderr)]
        return {"perplexity": perplexity, "stderr": perplexity * stderr, "interval": interval}


def _exp(value: float) -> float:
    """Return exp(value), infinite if it overflows a float, as for the words of a random model."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
