"""exp of the negative log-likelihood per token, word or other unit.

Returns `perplexity`, `stderr` (delta method over the items, where lm-evaluation-harness draws bootstrap samples; None
for a single item) and `interval` (exp of the loss's 95 % interval).
"""

from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import exp, normal_interval, ratio_of_sums


class Perplexity(evaluate.Metric):
    """exp of the sum of losses over the sum of counts; predictions are log-likelihoods of the items in nats."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=str(__doc__), citation="", features=datasets.Features(columns))

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        loss, stderr = ratio_of_sums([-value for value in predictions], references)
        interval = normal_interval(loss, stderr)
        return {
            "perplexity": exp(loss),
            "stderr": None if stderr is None else exp(loss) * stderr,
            "interval": None if interval is None else [exp(end) for end in interval],
        }
