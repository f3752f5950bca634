"""The tasks by name: "hellaswag" is a task under its default protocol, "hellaswag:completion" under another."""

import functools

from common.cli_errors import InputError
from common.suggestions import did_you_mean
from evaluation.tasks.cbt import cbt_tasks
from evaluation.tasks.hellaswag import HellaSwagCompletion, HellaSwagHarness
from evaluation.tasks.lambada import LambadaHarness, LambadaLastToken, LambadaStopWordFilter, LambadaWord
from evaluation.tasks.task_types import Task
from evaluation.tasks.validation import Validation
from evaluation.tasks.wikitext import WikiText2, WikiText2Raw

__all__ = ["Task", "default_protocols", "task_named", "tasks"]


def tasks() -> dict[str, Task]:
    """Return every task under every protocol by its full name; a task's first protocol is its default."""
    return {task.full_name: task for task in _all()}


def default_protocols() -> dict[str, Task]:
    """Return each task's name with the task under its default protocol."""
    defaults: dict[str, Task] = {}
    for task in _all():
        defaults.setdefault(task.name, task)
    return defaults


def task_named(name: str) -> Task:
    """Return the task that `name` asks for: "hellaswag", or with a protocol "hellaswag:completion".

    Raises:
        InputError: there is no such task or protocol; the message lists those that there are.
    """
    known, defaults = tasks(), default_protocols()
    if found := known.get(name) or defaults.get(name):
        return found
    task, _, _ = name.partition(":")
    if task in defaults:
        protocols = ", ".join(full_name for full_name in known if full_name.startswith(f"{task}:"))
        raise InputError(f"expected a protocol of {task}, found '{name}'; there are {protocols}")
    raise InputError(f"unknown task '{name}'; tasks are {', '.join(defaults)}{did_you_mean(task, defaults)}")


@functools.cache
def _all() -> list[Task]:
    return [
        HellaSwagCompletion(),
        HellaSwagHarness(),
        LambadaHarness(),
        LambadaLastToken(),
        LambadaWord(),
        LambadaStopWordFilter(),
        *cbt_tasks("CN"),
        *cbt_tasks("NE"),
        WikiText2(),
        WikiText2Raw(),
        Validation(),
    ]
