"""The tasks by name: "hellaswag" is a task under its default protocol, "hellaswag:harness" under another one."""

import functools

from common.cli_errors import InputError, did_you_mean
from evaluation.tasks.cbt import cbt_tasks
from evaluation.tasks.hellaswag import HellaSwagCompletion, HellaSwagHarness
from evaluation.tasks.lambada import LambadaHarness, LambadaLastToken, LambadaStopWordFilter, LambadaWord
from evaluation.tasks.task_types import Task
from evaluation.tasks.validation import Validation
from evaluation.tasks.wikitext import WikiText2, WikiText2Raw


@functools.cache
def tasks() -> dict[str, Task]:
    """Return every task under every protocol by its full name; the first protocol of a task is its default."""
    every = (
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
    )
    return {task.full_name: task for task in every}


def default_protocols() -> dict[str, Task]:
    """Return each task under its default protocol, by the task's name."""
    defaults: dict[str, Task] = {}
    for task in tasks().values():
        defaults.setdefault(task.name, task)
    return defaults


def task_named(name: str) -> Task:
    """Return the task called `name`, "hellaswag" or "hellaswag:completion".

    Raises:
        InputError: there is no such task or protocol; the message lists those that exist.
    """
    defaults = default_protocols()
    if found := tasks().get(name) or defaults.get(name):
        return found
    task, _, protocol = name.partition(":")
    if task in defaults:
        protocols = [full_name for full_name in tasks() if full_name.startswith(f"{task}:")]
        raise InputError(f"{task} has no protocol {protocol!r}; choose from {', '.join(protocols)}")
    raise InputError(f"unknown task '{name}'; tasks are {', '.join(defaults)}{did_you_mean(task, defaults)}")
