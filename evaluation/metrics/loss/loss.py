"""Loss in nats with its standard error and 95 % interval."""

from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import Z, ratio_of_sums

_DESCRIPTION = """The negative log-likelihood per token, or per other unit, in nats.

Returns `loss`, `stderr` (delta method over the items; None for a single item) and `interval` (95 %, normal).
"""


class Loss(evaluate.Metric):
    """Sum of losses over sum of counts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: log-likelihoods of the items in nats; references: their numbers of tokens",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        loss, stderr = ratio_of_sums([-value for value in predictions], references)
        interval = None if stderr is None else [loss - Z * stderr, loss + Z * stderr]
        return {"loss": loss, "stderr": stderr, "interval": interval}
