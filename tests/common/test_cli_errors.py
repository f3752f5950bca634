from common.cli_errors import did_you_mean


def test_closest_known_name_is_suggested() -> None:
    assert did_you_mean("learning_rat", ["seed", "learning_rate"]) == "; did you mean learning_rate?"


def test_nothing_is_suggested_for_a_name_unlike_all_others() -> None:
    assert did_you_mean("banana", ["seed", "learning_rate"]) == ""
