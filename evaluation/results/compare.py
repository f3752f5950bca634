"""Two models on the same items: how much they differ, and how likely the difference is by chance.

A paired test is more sensitive than two separate intervals, because most items are easy or hard for both models.
Accuracies are compared by McNemar's exact test, losses by a paired t-test.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.cli_errors import InputError
from evaluation.results.report import aligned, number
from evaluation.results.results_file import Results
from evaluation.results.standard_errors import Z
from evaluation.tasks.registry import task_named
from evaluation.tasks.task_types import Metric

Records = Sequence[Mapping[str, Any]]


class Difference(NamedTuple):
    """How model B differs from A: b - a of accuracies or mean losses in nats, its 95 % interval, the two-sided p."""

    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """Compare two models that were right or wrong on the same items (McNemar 1947, exact binomial distribution)."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    total, disagreed = len(a), only_a + only_b
    tail = sum(math.comb(disagreed, count) for count in range(min(only_a, only_b) + 1))
    difference = (only_b - only_a) / total
    half = Z * math.sqrt(disagreed - (only_b - only_a) ** 2 / total) / total
    return Difference(
        difference,
        (difference - half, difference + half),
        min(1.0, 2 * tail / 2**disagreed),
        f"McNemar, exact (only A right {only_a:,}, only B right {only_b:,})",
    )


def paired_t(a: Sequence[float], b: Sequence[float], counts: Sequence[int]) -> Difference:
    """Compare two models' log-likelihoods of the same items, in nats; an item counts so many tokens, words or bytes."""
    total, items = sum(counts), len(a)
    differences = [x - y for x, y in zip(a, b, strict=True)]  # loss of B - loss of A
    mean = math.fsum(differences) / total
    degrees = items - 1
    # Items weigh as much as they have tokens: the delta method for a ratio of sums.
    squares = math.fsum((d - mean * count) ** 2 for d, count in zip(differences, counts, strict=True))
    error = math.sqrt(items / degrees * squares) / total
    p_value = two_sided_p(mean / error, degrees) if error else float(mean == 0)
    half = t_quantile(degrees) * error
    return Difference(mean, (mean - half, mean + half), p_value, f"paired t ({items:,} items)")


def two_sided_p(t: float, degrees: int) -> float:
    """Return the probability that Student's t with `degrees` of freedom is beyond ±t; values below 1e-12 are noise.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4: finite sums for whole degrees of freedom.
    """
    theta = math.atan(abs(t) / math.sqrt(degrees))
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for j in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (j - 1) / j
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(degrees: int) -> float:
    """Return the t between whose negative and positive 95 % of Student's distribution lie."""
    low, high = Z, 13.0  # the normal distribution's value, and more than the value for one degree of freedom
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, degrees) > 0.05 else (low, middle)
    return high


def comparison_table(a: Results, b: Results) -> str:
    """Return a table of how B differs from A on the tasks that both were evaluated on, with the same items."""
    of_b = {result.task: result for result in b.tasks}
    shared = [(result, of_b[result.task]) for result in a.tasks if result.task in of_b]
    if not shared:
        names = [", ".join(result.task for result in results.tasks) for results in (a, b)]
        raise InputError(
            f"the results have no task in common: A has {names[0]}, B has {names[1]}; evaluate both models on the same "
            "tasks and protocols"
        )
    rows = [["task", "metric", "A", "B", "B - A", "95 %", "p", "test"]]
    for first, second in shared:
        for name, records in (("A", first.records), ("B", second.records)):
            if not records:
                raise InputError(
                    f"{name} has no items of {first.task}; run its command again with --save_items and the same "
                    "--output: cached items are not scored again"
                )
        keys = ("index", "gold", "target", "data")
        items = [[[record.get(key) for key in keys] for record in result.records] for result in (first, second)]
        if items[0] != items[1]:
            raise InputError(
                f"A ({len(items[0]):,} items) and B ({len(items[1]):,} items) were not evaluated on the same items of "
                f"{first.task}; use the same data and --limit"
            )
        for metric in task_named(first.task).metrics:
            values = [number(result.metrics[metric.name].value) for result in (first, second)]
            rows.append([first.task, metric.name, *values, *_cells(metric, first.records, second.records)])
    return "\n".join([f"A: {a.model} ({a.dtype})", f"B: {b.model} ({b.dtype})", "", *aligned(rows)])


def _cells(metric: Metric, a: Records, b: Records) -> list[str]:
    """Return the cells of a comparison, or why there is none."""
    unit = ""
    predictions_a, predictions_b = ([record[metric.prediction] for record in records] for records in (a, b))
    references_a, references_b = ([record[metric.reference] for record in records] for records in (a, b))
    if metric.module == "accuracy":
        right = ([record[metric.prediction] == record[metric.reference] for record in records] for records in (a, b))
        found = mcnemar(*right)
    elif references_a != references_b:
        return ["", "", "", f"none: the models' tokenizers give different {metric.reference}"]
    elif len(a) < 2:
        return ["", "", "", "none: a single item"]
    else:
        found, unit = paired_t(predictions_a, predictions_b, references_a), " nats"
    interval = f"{found.interval[0]:+.4f} – {found.interval[1]:+.4f}"
    p_value = f"{found.p_value:.2g}" if found.p_value >= 1e-12 else "< 1e-12"
    return [f"{found.difference:+.4f}{unit}", interval, p_value, found.test]
