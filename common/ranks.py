"""Errors of one rank end all ranks, instead of leaving the others in a collective call until it times out."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from common.cli_errors import InputError, os_error_message

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    message: str


class Ranks:
    """The ranks of a run, which exchange values and errors.

    `gather_object` is accelerate's, which joins the lists of all ranks; None for a rank that exchanges nothing.
    """

    def __init__(self, gather_object: Callable[[list[Any]], list[Any]] | None = None) -> None:
        self._gather_object = gather_object
        self._others_listen = gather_object is not None

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order. All ranks have to call it equally often.

        Raises:
            InputError: another rank failed inside `share_errors`.
        """
        if self._gather_object is None:
            return [value]
        self._others_listen = False  # not if the call itself fails
        values = self._gather_object([value])
        for rank, each in enumerate(values):
            if isinstance(each, _Failure):
                raise InputError(f"rank {rank} failed: {each.message}")
        self._others_listen = True
        return values

    @contextlib.contextmanager
    def share_errors(self) -> Iterator[None]:
        """Raise an `InputError` or an `OSError` about a file on the other ranks too, in their next `gather`."""
        try:
            yield
        except (InputError, OSError) as error:
            message = os_error_message(error) if isinstance(error, OSError) else str(error)
            if self._others_listen and message is not None:
                with contextlib.suppress(InputError):  # this rank's own error is the one to report
                    self.gather(_Failure(message))
            raise
