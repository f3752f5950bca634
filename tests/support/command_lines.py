"""Command lines that end with a user error."""

from collections.abc import Callable
from typing import Any

import pytest

from common.cli_errors import run_command


def refused(main: Callable[[list[str]], None], capsys: Any, *arguments: object) -> str:
    """Return the only line that the command line prints, its error message."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: main([str(argument) for argument in arguments]))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return str(captured.err)
