"""Accuracy with its standard error and 95 % interval."""

from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import accuracy_standard_error, wilson_interval

_DESCRIPTION = """The share of predictions that equal their reference.

Returns `accuracy`, `stderr` (sample standard deviation over the square root of n, as in lm-evaluation-harness; None for
a single item) and `interval` (95 %, Wilson).
"""


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = ("int64", "string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference.",
            inputs_description="predictions and references: integers or strings",
            features=[
                datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)})
                for kind in kinds
            ],
        )

    def _compute(self, predictions: list[Any], references: list[Any]) -> dict[str, Any]:
        right = sum(prediction == reference for prediction, reference in zip(predictions, references, strict=True))
        return {
            "accuracy": right / len(references),
            "stderr": accuracy_standard_error(right, len(references)),
            "interval": list(wilson_interval(right, len(references))),
        }
