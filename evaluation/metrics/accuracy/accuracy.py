"""Accuracy with its standard error and 95 % interval."""

from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import accuracy_standard_error, wilson_interval

_DESCRIPTION = """The share of predictions that equal their reference.

Returns `accuracy`, `stderr` (that of lm-evaluation-harness: a sample's standard deviation over the root of n; None for
a single item) and `interval`, Wilson's of 95 %.
"""


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference, numbers or texts."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = ("int64", "string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Wilson, E. B. (1927). Probable inference, the law of succession, and statistical inference.",
            inputs_description="predictions and references: whole numbers, or texts",
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
