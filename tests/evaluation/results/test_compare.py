"""Paired tests, compared with calculations by hand, and with scipy if it is installed."""

import math
import random
from itertools import product

import pytest

from common.cli_errors import InputError
from evaluation.results.compare import comparison_table, mcnemar, paired_t, t_quantile, two_sided_p
from evaluation.results.metric_values import MetricValue
from evaluation.results.results_file import Results, TaskResult


def results(task, records, model="a", **changes):
    metrics = {name: MetricValue(0.5, None, None, "accuracy") for name in ("acc", "acc_norm", "ppl")}
    values = {
        "revision": None,
        "commit": None,
        "weights": "0",
        "parameters": 1,
        "n_positions": 8,
        "dtype": "float32",
        "device": "cpu",
        "processes": 1,
        "data_dir": None,
        "limit": None,
        "started": "",
        "seconds": 0.0,
    }
    return Results(model=model, tasks=[TaskResult(task, len(records), 0.0, metrics, records)], **{**values, **changes})


def lambada(*rows):
    return [
        {"index": i, "gold": True, "prediction": right, "log_likelihood": nats, "words": words, "target": "x"}
        for i, (right, nats, words) in enumerate(rows)
    ]


def test_mcnemar_counts_items_on_which_the_models_disagree():
    # 6 against 1 of 7: each tail holds 1 + 7 of 128 outcomes.
    a = [True] * 6 + [False] + [True] * 5 + [False] * 8
    b = [False] * 6 + [True] + [True] * 5 + [False] * 8
    found = mcnemar(a, b)
    assert found.p_value == pytest.approx(2 * 8 / 128)
    assert found.difference == pytest.approx(-5 / 20)
    assert found.interval[0] < found.difference < found.interval[1]


def test_mcnemar_equals_enumeration_of_all_outcomes():
    for only_a, only_b in product(range(5), range(5)):
        total = only_a + only_b
        extreme = sum(abs(2 * sum(coins) - total) >= abs(only_a - only_b) for coins in product((0, 1), repeat=total))
        a = [True] * only_a + [False] * only_b + [True]
        b = [False] * only_a + [True] * only_b + [True]
        assert mcnemar(a, b).p_value == pytest.approx(extreme / 2**total)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 999])
def test_two_sided_p_equals_a_numerical_integral(degrees):
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    steps = 4_000
    for t in (0.0, 0.5, 2.1):
        heights = [(1 + (t * i / steps) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps + 1)]
        inside = 2 * constant * t / steps * (sum(heights) - (heights[0] + heights[-1]) / 2)
        assert two_sided_p(t, degrees) == pytest.approx(1 - inside, abs=1e-6)


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (30, 2.0423), (1000, 1.9623)])
def test_t_quantile_equals_published_tables(degrees, value):
    assert t_quantile(degrees) == pytest.approx(value, abs=1e-4)


def test_interval_contains_zero_if_p_is_above_5_percent():
    differences = [0.15, 0.4, 0.2]  # mean 0.25, standard error 0.0763763, two degrees of freedom
    found = paired_t([-1.0, -2.0, -3.0], [-1.0 - differences[0], -2.0 - differences[1], -3.0 - differences[2]], [1] * 3)
    assert found.difference == pytest.approx(0.25)
    assert found.interval == pytest.approx((0.25 - 4.302653 * 0.0763763, 0.25 + 4.302653 * 0.0763763), abs=1e-6)
    assert found.p_value == pytest.approx(0.0820, abs=1e-4)
    assert found.interval[0] < 0


def test_equal_counts_give_scipys_paired_t_test():
    stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra harness")
    rng = random.Random(0)
    a = [rng.gauss(-3, 1) for _ in range(40)]
    b = [x + rng.gauss(0.2, 0.5) for x in a]
    assert paired_t(a, b, [1] * 40).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6)


def test_equal_models_have_p_of_1():
    assert paired_t([-1.0, -2.0], [-1.0, -2.0], [1, 1]).p_value == 1.0
    assert mcnemar([True, False], [True, False]).p_value == 1.0


def test_table_shows_differences_and_tests():
    a = results("lambada:harness", lambada((True, -1.0, 1), (True, -2.0, 1), (False, -4.0, 1)))
    b = results("lambada:harness", lambada((True, -1.5, 1), (False, -2.5, 1), (False, -4.1, 1)), model="b")
    table = comparison_table(a, b)
    assert "A: a (float32)" in table
    assert "only A right 1, only B right 0" in table
    assert "+0.3667 nats" in table


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (lambada(), lambada(), "A has no items of lambada:harness; run its command again with --save_items"),
        (lambada((True, -1.0, 1)), lambada((True, -1.0, 1), (True, -1.0, 1)), "not evaluated on the same items"),
    ],
)
def test_missing_or_different_items_are_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        comparison_table(results("lambada:harness", a), results("lambada:harness", b))


def test_windows_of_different_data_are_refused():
    # Windows of two shard folders, with equal indices and numbers of tokens.
    rows = [{"index": i, "log_likelihood": -1.0 - i, "tokens": 4, "bytes": 9} for i in range(3)]
    a, b = ([{**row, "data": f"{name}{row['index']}"} for row in rows] for name in "ab")
    with pytest.raises(InputError, match="not evaluated on the same items of validation:windows"):
        comparison_table(results("validation:windows", a), results("validation:windows", b))


def test_results_without_a_common_task_are_refused():
    a, b = (results(f"lambada:{name}", lambada((True, -1.0, 1))) for name in ("harness", "last_token"))
    with pytest.raises(InputError, match="no task in common"):
        comparison_table(a, b)


def test_perplexities_over_different_tokens_are_not_compared():
    a = results("lambada:harness", lambada((True, -1.0, 1), (True, -2.0, 1)))
    b = results("lambada:harness", lambada((True, -1.0, 2), (True, -2.0, 1)))
    assert "none: the models' tokenizers give different words" in comparison_table(a, b)
