"""The negative log-likelihood per byte of text, in bits: comparable between tokenizers.

Returns `bits_per_byte`, `stderr` (delta method over the items; None for a single item) and `interval` (95 %, normal).
"""

import math
from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import normal_interval, ratio_of_sums


class BitsPerByte(evaluate.Metric):
    """Sum of losses in bits over sum of bytes; predictions are log-likelihoods of the items in nats."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description=str(__doc__), citation="", features=datasets.Features(columns))

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        bits, stderr = ratio_of_sums([-value / math.log(2) for value in predictions], references)
        return {"bits_per_byte": bits, "stderr": stderr, "interval": normal_interval(bits, stderr)}
