"""Learning rate and sequence length, compared with tables computed by hand."""

import pytest

from training.optim.schedule import learning_rate_at, sequence_length_at
from training.recipe import Schedule


@pytest.mark.parametrize(
    ("schedule", "table"),
    [
        # Peak 1, 4 steps of warmup, 12 steps in total, decay to a tenth. Cosine: 0.1 + 0.9·(1 + cos(π·(s−4)/8))/2.
        ("cosine", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 6: 0.8681981, 8: 0.55, 10: 0.2318019, 12: 0.1, 99: 0.1}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.775, 8: 0.55, 10: 0.325, 12: 0.1, 99: 0.1}),
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 11: 1.0, 99: 1.0}),
        # A fifth of 12 is 2 steps of decay, from step 10: 0.1 + 0.9·(1 − √((s−10)/2)).
        ("warmup_stable_decay", {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 10: 1.0, 11: 0.3636039, 12: 0.1, 99: 0.1}),
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


def rate(step: int, *, total_steps: int, schedule: Schedule, decay_steps: int | None = None) -> float:
    return learning_rate_at(
        step, peak=1.0, warmup_steps=4, total_steps=total_steps, schedule=schedule, decay_steps=decay_steps
    )


def test_decay_lasts_decay_steps() -> None:
    # From step 8 of 12: 0.1 + 0.9·(1 − √((s−8)/4)).
    for step, expected in {7: 1.0, 8: 1.0, 9: 0.55, 10: 0.3636039, 11: 0.2205771, 12: 0.1}.items():
        found = rate(step, total_steps=12, schedule="warmup_stable_decay", decay_steps=4)
        assert found == pytest.approx(expected, abs=1e-7), step


def test_decay_that_is_too_long_starts_after_the_warmup() -> None:
    table = {3: 1.0, 4: 1.0, 5: 0.55, 6: 0.3636039, 8: 0.1}  # from step 4 of 8: 0.1 + 0.9·(1 − √((s−4)/4))
    for step, expected in table.items():
        found = rate(step, total_steps=8, schedule="warmup_stable_decay", decay_steps=99)
        assert found == pytest.approx(expected, abs=1e-7), step


def test_stable_rate_does_not_depend_on_the_end_before_the_decay() -> None:
    for end in (20, 50, 1000):
        rates = [rate(step, total_steps=end, schedule="warmup_stable_decay", decay_steps=5) for step in range(15)]
        assert rates == [0.25, 0.5, 0.75, *[1.0] * 12]


def test_extended_run_has_the_learning_rate_of_the_longer_run() -> None:
    # Cosine over 4 + 8 steps ended at a tenth; at step 12 of 4 + 16 it is halfway down again: 0.1 + 0.9 / 2.
    assert rate(12, total_steps=12, schedule="cosine") == pytest.approx(0.1)
    assert rate(12, total_steps=20, schedule="cosine") == pytest.approx(0.55)
    assert rate(12, total_steps=20, schedule="linear") == pytest.approx(0.55)
    assert rate(12, total_steps=20, schedule="warmup_stable_decay", decay_steps=4) == 1.0


@pytest.mark.parametrize(
    ("warmup_steps", "lengths"),
    [(0, [64] * 6), (1, [16, 64, 64, 64, 64, 64]), (4, [16, 16, 32, 32, 64, 64]), (5, [16, 16, 16, 32, 32, 64])],
)
def test_sequences_are_a_quarter_then_half_as_long(warmup_steps: int, lengths: list[int]) -> None:
    assert [sequence_length_at(step, seq_len=64, warmup_steps=warmup_steps) for step in range(6)] == lengths
