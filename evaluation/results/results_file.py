"""results.json: what a model reached on which tasks, and all that is needed to know what that means."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from evaluation.results.metric_values import Measured
from evaluation.results.references import published
from evaluation.results.task_runner import TaskResult
from evaluation.tasks.registry import task_named

FORMAT_VERSION = 1
_PACKAGES = ("gpt2-scratch", "torch", "transformers", "tokenizers", "datasets", "evaluate")


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Results:
    """A model judged on tasks.

    Attributes:
        model: the folder or Hub id.
        revision: what was asked for on the Hub; None for a folder, or the newest.
        commit: what that was.
        weights: a hash of all weights, the config and the tokenizer.
        parameters: of the model.
        n_positions: the longest sequence that it takes.
        dtype: "float32".
        device: "cpu", or the GPU's name.
        processes: that shared the work.
        data_dir: where the data lay; None for the Hub.
        limit: the most items of a task; None for all.
        started: the time, ISO 8601 with its zone.
        seconds: of everything behind the model's loading.
        tasks: the results.
        versions: of packages.
        step: of the run that trains the model; None for a finished one.
    """

    model: str
    revision: str | None
    commit: str | None
    weights: str
    parameters: int
    n_positions: int
    dtype: str
    device: str
    processes: int
    data_dir: str | None
    limit: int | None
    started: str
    seconds: float
    tasks: list[TaskResult]
    versions: dict[str, str] = field(default_factory=_versions)
    step: int | None = None

    def write(self, path: Path, *, with_items: bool) -> None:
        """Write results.json, whole or not at all; `with_items` keeps the record of every item."""
        text = json.dumps(self.to_json(with_items=with_items), indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, text + "\n")

    def to_json(self, *, with_items: bool) -> dict[str, Any]:
        """Return what results.json holds."""
        values = {name: value for name, value in vars(self).items() if name != "tasks"}
        tasks = {result.task: _task_to_json(result, with_items=with_items) for result in self.tasks}
        return {"format_version": FORMAT_VERSION, **values, "tasks": tasks}


def _task_to_json(result: TaskResult, *, with_items: bool) -> dict[str, Any]:
    task = task_named(result.task)
    figures = {}
    for name, measured in result.figures.items():
        figures[name] = {
            "value": _finite(measured.value),
            "stderr": _finite(measured.stderr),
            "interval_95": [_finite(end) for end in measured.interval] if measured.interval else None,
            "metric": measured.metric,
            "published": [
                {"size": each.size, "value": each.value, "source": each.source} for each in published(result.task, name)
            ],
        }
    values = {
        "task": task.name,
        "protocol": task.protocol,
        "description": task.description,
        "source": task.source,
        "items": result.items,
        "seconds": round(result.seconds, 3),
        "figures": figures,
    }
    return {**values, "records": result.records} if with_items else values


def _finite(value: float | None) -> float | None:
    """Return None for what JSON has no number for: a perplexity beyond a float."""
    return value if value is not None and math.isfinite(value) else None


def read_results(path: Path) -> Results:
    """Return what a results.json holds; a task without records has none.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"expected results at {path}, found {error.strerror}; make them with python -m evaluation.run --output"
        ) from None
    except ValueError:
        values = None
    try:
        if values["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"expected results of format {FORMAT_VERSION} in {path}, found {values['format_version']}; make them "
                "again with python -m evaluation.run --output"
            )
        tasks = [_task_from_json(name, task) for name, task in values.pop("tasks").items()]
        del values["format_version"]
        return Results(**values, tasks=tasks)
    except (TypeError, KeyError, AttributeError):
        raise InputError(
            f"expected results that python -m evaluation.run --output wrote in {path}, found another file; name theirs"
        ) from None


def _task_from_json(name: str, values: Mapping[str, Any]) -> TaskResult:
    figures = {}
    for figure, given in values["figures"].items():
        interval = given["interval_95"]
        value = math.inf if given["value"] is None else given["value"]
        figures[figure] = Measured(value, given["stderr"], tuple(interval) if interval else None, given["metric"])
    records = [{"index": record["index"], **record} for record in values.get("records", [])]
    return TaskResult(name, values["items"], values["seconds"], figures, records)
