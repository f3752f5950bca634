"""Worker processes: results in order, and what happens when one is killed."""

import os

import pytest

from common.cli_errors import InputError
from common.worker_processes import map_in_order


def _square(item: int) -> int:
    return item * item


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_results_come_in_the_order_of_the_items(num_workers: int) -> None:
    assert list(map_in_order(_square, range(50), num_workers=num_workers)) == [item * item for item in range(50)]


def _exit_at_three(item: int) -> int:
    if item == 3:
        os._exit(1)
    return item


def test_killed_worker_is_a_clear_error() -> None:
    with pytest.raises(InputError, match="one of 1 worker processes was killed"):
        list(map_in_order(_exit_at_three, range(50), num_workers=1))
