"""Ranks exchange values, and an error of one is an error of all; threads stand in for ranks."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.cli_errors import InputError
from common.ranks import Ranks


def run_on_two_ranks(function: Callable[[int, Ranks], Any]) -> list[Any]:
    """What the function returns or raises on each rank."""
    values: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=30)

    def on_rank(rank: int) -> Any:
        def gather_object(own: list[Any]) -> list[Any]:
            values[rank] = own[0]
            barrier.wait()
            everyone = list(values)
            barrier.wait()
            return everyone

        try:
            return function(rank, Ranks(gather_object))
        except InputError as error:
            return error

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(on_rank, range(2)))


def test_values_are_gathered_in_rank_order() -> None:
    assert run_on_two_ranks(lambda rank, ranks: ranks.gather(rank)) == [[0, 1], [0, 1]]
    assert Ranks().gather("own") == ["own"]


def test_error_of_one_rank_is_raised_on_all_in_the_next_gather() -> None:
    def function(rank: int, ranks: Ranks) -> None:
        with ranks.share_errors():
            ranks.gather(rank)
            if rank == 1:
                raise InputError("no such file")
            ranks.gather(rank)

    assert list(map(str, run_on_two_ranks(function))) == ["rank 1 failed: no such file", "no such file"]


def test_each_rank_reports_its_own_error() -> None:
    def function(rank: int, ranks: Ranks) -> None:
        with ranks.share_errors():
            raise InputError(f"error {rank}")

    assert list(map(str, run_on_two_ranks(function))) == ["error 0", "error 1"]


def test_error_of_gather_itself_is_not_shared() -> None:
    calls = []

    def gather_object(values: list[Any]) -> list[Any]:
        calls.append(values)
        raise InputError("could not connect")

    ranks = Ranks(gather_object)
    with pytest.raises(InputError, match="could not connect"), ranks.share_errors():
        ranks.gather(1)
    assert calls == [[1]]


def test_own_error_is_reported_even_if_the_ranks_cannot_connect() -> None:
    def gather_object(values: list[Any]) -> list[Any]:
        raise InputError("could not connect")

    with pytest.raises(InputError, match=r"^own$"), Ranks(gather_object).share_errors():
        raise InputError("own")
