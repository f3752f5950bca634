import pytest

from common.durations import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(7.6, "8 s"), (99.4, "99 s"), (150, "2.5 min"), (3599, "1 h 00 min"), (6060, "1 h 41 min")],
        *[(183600, "2 d 03 h"), (float("nan"), "unknown time"), (float("inf"), "unknown time")],
    ],
)
def test_duration_is_formatted_in_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
