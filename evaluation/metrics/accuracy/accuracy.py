"""The share of predictions that equal their reference.

Returns `accuracy`, `stderr` (sample standard deviation over the square root of n, as in lm-evaluation-harness; None for
a single item) and `interval` (95 %, Wilson).
"""

from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import accuracy_standard_error, wilson_interval


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference; both are integers or strings."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(__doc__),
            citation="Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference.",
            features=[
                datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
                for kind in ("int64", "string")
            ],
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        right = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {
            "accuracy": right / len(references),
            "stderr": accuracy_standard_error(right, len(references)),
            "interval": list(wilson_interval(right, len(references))),
        }
