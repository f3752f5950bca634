"""Standard errors and confidence intervals of metrics.

Standard errors are those of lm-evaluation-harness where it has a formula (the sample standard deviation over the square
root of n). For perplexities, where it draws bootstrap samples, the delta method gives the same up to the noise of the
draws.
"""

import math
from collections.abc import Sequence

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def accuracy_standard_error(right: int, total: int) -> float | None:
    """Return the standard error of the share `right` / `total`; None for a single item."""
    if total < 2:
        return None
    share = right / total
    return math.sqrt(share * (1.0 - share) / (total - 1))


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share: it stays between 0 and 1, and is accurate for few items.

    Source: Wilson 1927; recommended by Brown, Cai and DasGupta 2001.
    """
    share, squared = right / total, Z**2 / total
    middle = (share + squared / 2) / (1 + squared)
    half = Z / (1 + squared) * math.sqrt(share * (1 - share) / total + squared / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def normal_interval(value: float, stderr: float | None) -> list[float] | None:
    """Return the 95 % interval of a normal distribution; None without a standard error."""
    return None if stderr is None else [value - Z * stderr, value + Z * stderr]


def exp(value: float) -> float:
    """Return exp(value), infinite if it overflows a float, as for the words of a random model."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def ratio_of_sums(values: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Return sum(values) / sum(counts) and its standard error by the delta method; None for a single item.

    An item has a value, such as its loss in nats, and a count, such as its number of tokens.
    """
    total = math.fsum(counts)
    if len(values) != len(counts) or total <= 0:
        raise ValueError(f"needs as many values as counts, and counts above 0; got {len(values)} and {len(counts)}")
    ratio = math.fsum(values) / total
    if len(values) < 2:
        return ratio, None
    squares = math.fsum((value - ratio * count) ** 2 for value, count in zip(values, counts, strict=True))
    return ratio, math.sqrt(len(values) / (len(values) - 1) * squares) / total
