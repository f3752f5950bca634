"""Bits per byte with its standard error and 95 % interval."""

import math
from typing import Any

import datasets
import evaluate

from evaluation.results.standard_errors import Z, ratio_of_sums

_DESCRIPTION = """The negative log-likelihood per byte of text, in bits: comparable between tokenizers.

Returns `bits_per_byte`, `stderr` (delta method over the items; None for a single item) and `interval` (95 %, normal).
"""


class BitsPerByte(evaluate.Metric):
    """Sum of losses in bits over sum of bytes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description="predictions: log-likelihoods of the items in nats; references: their numbers of bytes",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, Any]:
        bits, stderr = ratio_of_sums([-value / math.log(2) for value in predictions], references)
        interval = None if stderr is None else [bits - Z * stderr, bits + Z * stderr]
        return {"bits_per_byte": bits, "stderr": stderr, "interval": interval}
