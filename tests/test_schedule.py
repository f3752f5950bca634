"""The learning rate, against tables worked out by hand."""

import pytest

from training.schedule import Schedule, learning_rate_at


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        # Peak 1, 4 steps of warm-up, 12 steps in all, down to a tenth. Cosine: 0.1 + 0.9·(1 + cos(π·(s−4)/8))/2.
        ("cosine", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 6: 0.8681981, 8: 0.55, 10: 0.2318019, 12: 0.1, 99: 0.1}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.775, 8: 0.55, 10: 0.325, 12: 0.1, 99: 0.1}),
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 11: 1.0, 99: 1.0}),
    ],
)
def test_learning_rate_follows_the_table(schedule: Schedule, table: dict[int, float]) -> None:
    for step, expected in table.items():
        rate = learning_rate_at(step, peak=1.0, warmup_steps=4, total_steps=12, min_ratio=0.1, schedule=schedule)
        assert rate == pytest.approx(expected, abs=1e-7), f"step {step}"


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert learning_rate_at(0, peak=3e-4, warmup_steps=0, total_steps=10) == 3e-4


def test_a_warmup_as_long_as_the_run_never_divides_by_zero() -> None:
    assert learning_rate_at(9, peak=1.0, warmup_steps=10, total_steps=10) == 1.0
    assert learning_rate_at(10, peak=1.0, warmup_steps=10, total_steps=10) == 1.0
