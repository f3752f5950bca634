"""Paired tests: against sums by hand, and against scipy where it is there."""

import math
import random
from itertools import product

import pytest

from common.cli_errors import InputError
from evaluation.results.compare import comparison_table, mcnemar, paired_t, t_quantile, two_sided_p
from evaluation.results.metric_values import Measured
from evaluation.results.results_file import Results
from evaluation.results.task_runner import TaskResult


def results(task, records, model="a", **changes):
    figures = {name: Measured(0.5, None, None, "accuracy") for name in ("acc", "acc_norm", "ppl")}
    facts = {
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
    return Results(model=model, tasks=[TaskResult(task, len(records), 0.0, figures, records)], **{**facts, **changes})


def lambada(*rows):
    return [
        {"index": i, "gold": True, "prediction": right, "log_likelihood": nats, "words": words, "target": "x"}
        for i, (right, nats, words) in enumerate(rows)
    ]


def test_mcnemar_counts_the_items_on_which_the_models_disagree():
    # 6 against 1 of 7: both tails hold (1 + 7) of 128 outcomes each.
    a = [True] * 6 + [False] + [True] * 5 + [False] * 8
    b = [False] * 6 + [True] + [True] * 5 + [False] * 8
    found = mcnemar(a, b)
    assert found.p_value == pytest.approx(2 * 8 / 128)
    assert found.difference == pytest.approx(-5 / 20)
    assert found.interval[0] < found.difference < found.interval[1]


def test_mcnemar_equals_going_through_every_outcome():
    for only_a, only_b in product(range(5), range(5)):
        total = only_a + only_b
        extreme = sum(abs(2 * sum(coins) - total) >= abs(only_a - only_b) for coins in product((0, 1), repeat=total))
        a = [True] * only_a + [False] * only_b + [True]
        b = [False] * only_a + [True] * only_b + [True]
        assert mcnemar(a, b).p_value == pytest.approx(extreme / 2**total)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 999])
def test_students_t_equals_its_integral(freedom):
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps = 4_000
    for t in (0.0, 0.5, 2.1):
        heights = [(1 + (t * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
        inside = 2 * constant * t / steps * (sum(heights) - (heights[0] + heights[-1]) / 2)
        assert two_sided_p(t, freedom) == pytest.approx(1 - inside, abs=1e-6)


@pytest.mark.parametrize(("freedom", "value"), [(1, 12.7062), (2, 4.3027), (9, 2.2622), (30, 2.0423), (1000, 1.9623)])
def test_the_quantile_of_students_t_is_that_of_the_tables(freedom, value):
    assert t_quantile(freedom) == pytest.approx(value, abs=1e-4)


def test_the_interval_holds_zero_exactly_where_the_p_value_is_above_five_in_a_hundred():
    differences = [0.15, 0.4, 0.2]  # mean 0.25, standard error 0.0763763, two degrees of freedom
    found = paired_t([-1.0, -2.0, -3.0], [-1.0 - differences[0], -2.0 - differences[1], -3.0 - differences[2]], [1] * 3)
    assert found.difference == pytest.approx(0.25)
    assert found.interval == pytest.approx((0.25 - 4.302653 * 0.0763763, 0.25 + 4.302653 * 0.0763763), abs=1e-6)
    assert found.p_value == pytest.approx(0.0820, abs=1e-4)
    assert found.interval[0] < 0


def test_equal_counts_make_it_the_usual_paired_t_test():
    stats = pytest.importorskip("scipy.stats", reason="scipy is only here with the independent judge")
    rng = random.Random(0)
    a = [rng.gauss(-3, 1) for _ in range(40)]
    b = [x + rng.gauss(0.2, 0.5) for x in a]
    assert paired_t(a, b, [1] * 40).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-6)


def test_models_that_do_alike_do_not_differ():
    assert paired_t([-1.0, -2.0], [-1.0, -2.0], [1, 1]).p_value == 1.0
    assert mcnemar([True, False], [True, False]).p_value == 1.0


def test_the_table_says_what_differs_by_how_much():
    a = results("lambada:harness", lambada((True, -1.0, 1), (True, -2.0, 1), (False, -4.0, 1)))
    b = results("lambada:harness", lambada((True, -1.5, 1), (False, -2.5, 1), (False, -4.1, 1)), model="b")
    table = comparison_table(a, b)
    assert "A: a (float32)" in table
    assert "only A right 1, only B right 0" in table
    assert "+0.3667 nats" in table


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (lambada(), lambada(), "found only figures; run its command again with --save_items and the same --output"),
        (lambada((True, -1.0, 1)), lambada((True, -1.0, 1), (True, -1.0, 1)), "the same items"),
    ],
)
def test_items_that_are_missing_or_other_ones_are_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        comparison_table(results("lambada:harness", a), results("lambada:harness", b))


def test_windows_of_other_data_are_refused():
    # Two shard folders: the windows of both have the same numbers and as many tokens.
    rows = [{"index": i, "log_likelihood": -1.0 - i, "tokens": 4, "bytes": 9} for i in range(3)]
    a, b = ([{**row, "data": f"{name}{row['index']}"} for row in rows] for name in "ab")
    with pytest.raises(InputError, match="the same items of validation:windows in both"):
        comparison_table(results("validation:windows", a), results("validation:windows", b))


def test_results_without_a_common_protocol_are_refused():
    a, b = (results(f"lambada:{name}", lambada((True, -1.0, 1))) for name in ("harness", "last_token"))
    with pytest.raises(InputError, match="a task that both have been judged on"):
        comparison_table(a, b)


def test_perplexities_over_other_tokens_are_not_compared():
    a = results("lambada:harness", lambada((True, -1.0, 1), (True, -2.0, 1)))
    b = results("lambada:harness", lambada((True, -1.0, 2), (True, -2.0, 1)))
    assert "none: the models cut the text into other words" in comparison_table(a, b)
