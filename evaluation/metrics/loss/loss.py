"""The negative log-likelihood per token, or per other unit, in nats.

Returns `loss`, `stderr` (delta method over the items; None for a single item) and `interval` (95 %, normal).
"""

from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import normal_interval, ratio_of_sums


class Loss(evaluate.Metric):
    """Sum of losses over sum of counts; predictions are log-likelihoods of the items in nats."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=str(__doc__), citation="", features=datasets.Features(columns))

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        loss, stderr = ratio_of_sums([-value for value in predictions], references)
        return {"loss": loss, "stderr": stderr, "interval": normal_interval(loss, stderr)}
