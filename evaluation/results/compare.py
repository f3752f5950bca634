"""Two models on the same items: the difference, and how likely chance alone makes one as large.

Pairs say more than two intervals side by side, because most items are easy or hard for both models. Accuracies are
compared by McNemar's exact test over the items on which the models disagree; losses by the t-test of the differences
of the items' losses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.cli_errors import InputError
from evaluation.results.report import aligned, number
from evaluation.results.results_file import Results
from evaluation.results.standard_errors import Z
from evaluation.tasks.registry import task_named
from evaluation.tasks.task_types import Figure


@dataclass(frozen=True)
class Difference:
    """B's figure against A's.

    Attributes:
        difference: b - a; of accuracies, or of losses in nats for what is counted.
        interval: of the difference, 95 %.
        p_value: how often chance alone makes a difference at least as large, two-sided.
        test: which.
        counted: on what it rests.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    counted: str


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """Return the comparison of two models that were right or wrong on the same items.

    Source: McNemar 1947, with the exact binomial distribution.
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    total, disagreed = len(a), only_a + only_b
    tail, term = 0, 1
    for count in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (disagreed - count) // (count + 1)
    p_value = min(1.0, 2 * tail / 2**disagreed)
    difference = (only_b - only_a) / total
    half = Z * math.sqrt(disagreed - (only_b - only_a) ** 2 / total) / total
    return Difference(
        difference,
        (difference - half, difference + half),
        p_value,
        "McNemar, exact",
        f"only A right {only_a:,}, only B right {only_b:,}",
    )


def paired_t(a: Sequence[float], b: Sequence[float], counts: Sequence[int]) -> Difference:
    """Return the comparison of two models' losses on the same items.

    Args:
        a, b: log-likelihoods in nats, of an item each.
        counts: tokens, words or bytes of the items, which both models share.
    """
    total, number_of_items = sum(counts), len(a)
    differences = [x - y for x, y in zip(a, b, strict=True)]  # B's loss less A's
    mean = math.fsum(differences) / total
    freedom = number_of_items - 1
    # A long item's difference weighs as much as it has tokens: the delta method for a ratio of sums.
    squares = math.fsum((d - mean * count) ** 2 for d, count in zip(differences, counts, strict=True))
    error = math.sqrt(number_of_items / freedom * squares) / total
    p_value = two_sided_p(mean / error, freedom) if error else float(mean == 0)
    half = t_quantile(freedom) * error
    return Difference(
        mean,
        (mean - half, mean + half),
        p_value,
        "paired t",
        f"{number_of_items:,} items",
    )


def two_sided_p(t: float, freedom: int) -> float:
    """Return how often Student's t with `freedom` degrees lies beyond ±t.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4, which are finite sums for whole degrees of freedom. Far out, where
    these lose their digits against 1, what is left is below 1e-12 and returned as it comes.
    """
    theta = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for j in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(freedom: int) -> float:
    """Return within how many standard errors 95 % of Student's t with `freedom` degrees lie."""
    low, high = Z, 13.0  # the normal distribution's, and more than that of a single degree of freedom
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > 0.05 else (low, middle)
    return high


def comparison_table(a: Results, b: Results) -> str:
    """Return a table of the differences of B from A on every task that both have.

    Raises:
        InputError: they share no task, lack the items, or were not judged on the same ones.
    """
    of_b = {result.task: result for result in b.tasks}
    shared = [(result, of_b[result.task]) for result in a.tasks if result.task in of_b]
    if not shared:
        raise InputError(
            f"expected a task that both have been judged on, found {', '.join(r.task for r in a.tasks)} and "
            f"{', '.join(of_b)}; judge them on the same tasks and protocols"
        )
    rows = [["task", "figure", "A", "B", "B - A", "95 %", "p", "test"]]
    for first, second in shared:
        for name, records in (("A", first.records), ("B", second.records)):
            if not records:
                raise InputError(
                    f"expected the items of {first.task} in {name}, found only figures; run its command again with "
                    "--save_items and the same --output: what is finished is not scored again"
                )
        _refuse_other_items(first.task, first.records, second.records)
        for figure in task_named(first.task).figures:
            values = [number(result.figures[figure.name].value) for result in (first, second)]
            rows.append([first.task, figure.name, *values, *_shown(figure, first.records, second.records)])
    return "\n".join([f"A: {a.model} ({a.dtype})", f"B: {b.model} ({b.dtype})", "", *aligned(rows)])


def _refuse_other_items(task: str, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> None:
    same = len(a) == len(b) and all(
        all(x.get(key) == y.get(key) for key in ("index", "gold", "target", "data")) for x, y in zip(a, b, strict=True)
    )
    if not same:
        raise InputError(
            f"expected the same items of {task} in both, found {len(a):,} and {len(b):,} that do not match; use the "
            "same data and --limit"
        )


def _shown(figure: Figure, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the difference's cells, or why there is none."""
    unit = ""
    if figure.metric == "accuracy":
        right_a, right_b = ([r[figure.prediction] == r[figure.reference] for r in records] for records in (a, b))
        found = mcnemar(right_a, right_b)
    else:
        counts = [record[figure.reference] for record in a]
        if counts != [record[figure.reference] for record in b]:
            return ["", "", "", f"none: the models cut the text into other {figure.reference}"]
        if len(a) < 2:
            return ["", "", "", "none: a single item"]
        likelihoods_a, likelihoods_b = ([record[figure.prediction] for record in records] for records in (a, b))
        found, unit = paired_t(likelihoods_a, likelihoods_b, counts), " nats"
    interval = f"{found.interval[0]:+.4f} – {found.interval[1]:+.4f}"
    p_value = f"{found.p_value:.2g}" if found.p_value >= 1e-12 else "< 1e-12"
    return [f"{found.difference:+.4f}{unit}", interval, p_value, f"{found.test} ({found.counted})"]
