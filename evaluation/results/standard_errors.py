"""How far a figure may be from what endlessly many items of the same kind would give.

Standard errors are those of lm-evaluation-harness where it has a formula (a sample's standard deviation, with n - 1,
over the square root of n). Where it draws bootstrap samples, for perplexities, the delta method gives the same without
drawing: it agrees with them to their own noise, and is the same in every run.
"""

import math
from collections.abc import Sequence

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def accuracy_standard_error(right: int, total: int) -> float | None:
    """Return the standard error of `right` out of `total`; None for a single item."""
    if total < 2:
        return None
    share = right / total
    return math.sqrt(share * (1.0 - share) / (total - 1))


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share: Wilson's, which stays between 0 and 1 and is right for few items too.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it.
    """
    share, squared = right / total, Z**2 / total
    middle = (share + squared / 2) / (1 + squared)
    half = Z / (1 + squared) * math.sqrt(share * (1 - share) / total + squared / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio_of_sums(values: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Return sum(values) / sum(counts) and its standard error, by the delta method; None for a single item.

    Args:
        values: of an item each, such as a passage's loss in nats.
        counts: of the same items, such as their tokens; not all zero.

    Raises:
        ValueError: other numbers of values than of counts, or nothing to divide by.
    """
    total = math.fsum(counts)
    if len(values) != len(counts) or total <= 0:
        raise ValueError(f"expected as many values as counts, and counts above 0; found {len(values)}, {len(counts)}")
    ratio = math.fsum(values) / total
    number = len(values)
    if number < 2:
        return ratio, None
    squares = math.fsum((value - ratio * count) ** 2 for value, count in zip(values, counts, strict=True))
    return ratio, math.sqrt(number / (number - 1) * squares) / total
