"""results.json: the metrics of a model, and everything needed to interpret them."""

import contextlib
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
from evaluation.results.metric_values import MetricValue
from evaluation.results.references import published
from evaluation.tasks.registry import task_named

FORMAT_VERSION = 1
_PACKAGES = ("gpt2-scratch", "torch", "transformers", "tokenizers", "datasets", "evaluate")


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, if installed."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@dataclass(frozen=True)
class TaskResult:
    """The result of a model on a task, by its full name."""

    task: str
    items: int
    seconds: float  # of scoring the items that were not cached
    metrics: dict[str, MetricValue]
    records: list[dict[str, Any]] = field(repr=False)  # in the order of the data; empty if the file had none


@dataclass(frozen=True)
class Results:
    """The results of a model."""

    model: str
    revision: str | None  # as requested on the Hub; None for a folder or the latest one
    commit: str | None  # that was loaded from the Hub
    weights: str  # a hash of weights, config and tokenizer
    parameters: int
    n_positions: int
    dtype: str
    device: str  # "cpu", or the name of the GPU
    processes: int
    data_dir: str | None  # None for the Hub
    limit: int | None  # maximum items per task; None for all
    started: str  # ISO 8601 with its time zone
    seconds: float  # of everything after loading the model
    tasks: list[TaskResult]
    versions: dict[str, str] = field(default_factory=_versions)
    step: int | None = None  # of the run that trains the model

    def write(self, path: Path, *, with_items: bool) -> None:
        """Write results.json atomically; `with_items` includes the record of every item."""
        values = {name: value for name, value in vars(self).items() if name != "tasks"}
        tasks = {result.task: _task_to_json(result, with_items=with_items) for result in self.tasks}
        content = {"format_version": FORMAT_VERSION, **values, "tasks": tasks}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(path, text + "\n")


def _task_to_json(result: TaskResult, *, with_items: bool) -> dict[str, Any]:
    task = task_named(result.task)
    metrics = {
        name: {
            "value": _finite(metric.value),
            "stderr": _finite(metric.stderr),
            "interval_95": [_finite(end) for end in metric.interval] if metric.interval else None,
            "metric": metric.module,
            "published": [
                {"size": each.size, "value": each.value, "source": each.source} for each in published(result.task, name)
            ],
        }
        for name, metric in result.metrics.items()
    }
    return {
        "task": task.name,
        "protocol": task.protocol,
        "description": task.description,
        "source": task.source,
        "items": result.items,
        "seconds": round(result.seconds, 3),
        "figures": metrics,  # the key of the file format
        **({"records": result.records} if with_items else {}),
    }


def _finite(value: float | None) -> float | None:
    """Return None for infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


def read_results(path: Path) -> Results:
    """Return the content of a results.json; tasks have no records if it was written without them."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; python -m evaluation.run --output writes results"
        ) from None
    except (ValueError, RecursionError):
        values = None
    try:
        if values["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{path} has format version {values['format_version']} instead of {FORMAT_VERSION}; evaluate the model "
                "again with this version"
            )
        tasks = [_task_from_json(name, task) for name, task in values.pop("tasks").items()]
        del values["format_version"]
        results = Results(**values, tasks=tasks)
        if not all(value is None or type(value) is int for value in (results.step, results.limit)):
            raise TypeError("step or limit is not a number")
        return results
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{path} was not written by python -m evaluation.run --output; choose another file") from None


def _task_from_json(name: str, values: Mapping[str, Any]) -> TaskResult:
    metrics = {}
    for name_of_metric, given in values["figures"].items():
        value = math.inf if given["value"] is None else given["value"]
        metrics[name_of_metric] = MetricValue(value, given["stderr"], given["interval_95"], given["metric"])
        numbers = (value, given["stderr"], *(given["interval_95"] or ()))
        if not all(number is None or type(number) in (int, float) for number in numbers):
            raise TypeError("a metric is not a number")
    records = [{"index": record["index"], **record} for record in values.get("records", [])]
    return TaskResult(name, values["items"], values["seconds"], metrics, records)
