"""The log of a run over all its starts: kept in memory while it trains, and read from its folder afterwards."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.atomic_files import write_atomically
from common.cli_errors import InputError
from common.json_files import instance_of
from evaluation.results.results_file import Results, read_results
from evaluation.tasks.registry import task_named
from training.recipe import Recipe

TASK_RESULTS = "eval_results.json"
METRICS = "metrics.jsonl"

_STARTS = ".starts.jsonl"
_PLOTTED = ("train_loss", "val_loss", "learning_rate", "grad_norm", "tokens_per_second", "hellaswag_acc_norm")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Start:
    """Hardware and libraries of one start of a run, which took the steps after `step`."""

    step: int
    device: str
    devices: int
    software: str = ""  # names and versions of libraries

    @property
    def hardware(self) -> str:
        """Such as `8 × NVIDIA A100-SXM4-80GB`."""
        return f"{self.devices} × {self.device}" if self.devices > 1 else self.device


@dataclass(frozen=True)
class RunFacts:
    """A run after a number of steps, for its summary and its model card; None is not known yet."""

    name: str
    parameters: int
    steps: int
    tokens: int
    hardware: tuple[str, ...] = ()  # of the starts in order, without repetitions
    software: str = ""  # of the newest start
    seconds: float | None = None  # of training steps, without validation, samples and checkpoints
    val_step: int | None = None  # of the newest validation
    val_loss: float | None = None
    bits_per_byte: float | None = None
    gzip_bits_per_byte: float | None = None  # what `gzip -9` needs for the validation text
    samples: tuple[str, ...] = ()  # the newest ones
    task_results: Results | None = None  # the newest ones, unless a later step has replaced them


@dataclass
class RunHistory:
    """What a run has logged so far."""

    metrics: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    samples: dict[int, list[str]] = field(default_factory=dict)  # the texts of samples.txt by step
    starts: list[Start] = field(default_factory=list)
    task_results: Results | None = None  # the newest ones
    gzip_bits_per_byte: float | None = None  # of the validation text
    unreadable: list[str] = field(default_factory=list)  # lines of metrics.jsonl that were skipped

    @classmethod
    def load(cls, output_dir: Path, last_step: float = math.inf) -> "RunHistory":
        """Read the history of a run from its folder, without metrics and samples after `last_step`."""
        results = None
        with contextlib.suppress(InputError):  # there are none, or an earlier version wrote them
            found = read_results(output_dir / TASK_RESULTS)
            for task in found.tasks:
                task_named(task.task)
            results = found
        metrics, unreadable = _read_metrics(output_dir)
        return cls(
            metrics=[line for line in metrics if line["step"] <= last_step],
            samples={step: texts for step, texts in _read_samples(output_dir).items() if step <= last_step},
            starts=_read_starts(output_dir),
            task_results=results,
            unreadable=unreadable,
        )

    def add_start(self, output_dir: Path, start: Start) -> None:
        """Add a start and write it to the run folder; earlier starts keep no step that this one takes again."""
        self.starts = [earlier for earlier in self.starts if earlier.step < start.step] + [start]
        text = "".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in self.starts)
        write_atomically(output_dir / _STARTS, text)

    def facts(self, recipe: Recipe, *, steps: int, parameters: int) -> RunFacts:
        """Return what is known of the run after `steps` steps; later entries are ignored."""
        metrics = [line for line in self.metrics if line["step"] <= steps]
        validation: dict[str, Any] = next((line for line in reversed(metrics) if "val_loss" in line), {})
        hardware = [start.hardware for start in self.starts if start.step < steps]
        if hardware and self.starts[0].step:  # an earlier version, or a checkpoint of another run folder
            hardware.insert(0, "unknown hardware")
        drawn = [step for step in self.samples if step <= steps]
        results = self.task_results
        if results is not None and (results.step is None or results.step > steps):
            results = None
        return RunFacts(
            name=(recipe.hub_model_id or Path(recipe.output_dir).resolve().name).split("/")[-1],
            parameters=parameters,
            steps=steps,
            tokens=steps * recipe.tokens_per_step,
            hardware=tuple(name for name, _ in itertools.groupby(hardware)),
            software=next((start.software for start in reversed(self.starts) if start.step < steps), ""),
            seconds=training_seconds([line for line in metrics if "train_loss" in line]),
            val_step=validation.get("step"),
            val_loss=validation.get("val_loss"),
            bits_per_byte=validation.get("bits_per_byte"),
            gzip_bits_per_byte=self.gzip_bits_per_byte,
            samples=tuple(self.samples[max(drawn)]) if drawn else (),
            task_results=results,
        )


def _read_starts(output_dir: Path) -> list[Start]:
    """Return the starts of a run; truncated and edited lines are skipped."""
    starts = []
    for text in _read(output_dir / _STARTS).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            starts.append(instance_of(Start, json.loads(text)))
    return starts


def training_seconds(lines: list[dict[str, Any]]) -> float | None:
    """Seconds of training steps over all starts, by the tokens and tokens per second of the logged steps."""
    seconds, tokens = 0.0, 0.0
    for line in lines:
        if line.get("tokens_per_second"):
            seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
        tokens = line["tokens"]
    return seconds or None


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, with NaN and infinities as floats; unreadable lines are skipped."""
    return _read_metrics(output_dir)[0]


def _read_metrics(output_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines of metrics.jsonl, and those that cannot be read."""
    lines, unreadable = [], []
    for text in _read(output_dir / METRICS).splitlines():
        if line := _parsed(text):
            lines.append(line)
        else:
            unreadable.append(text)
    return lines, unreadable


def set_aside_unreadable_metrics(output_dir: Path, unreadable: Sequence[str]) -> str | None:
    """Keep a copy of a metrics.jsonl with unreadable lines, and return what to print; None if all can be read.

    A last line that a killed run truncated is not kept.
    """
    if not unreadable:
        return None
    if len(unreadable) == 1 and _read(output_dir / METRICS).endswith(unreadable[0]):
        return f"{output_dir / METRICS}: dropped a truncated last line"
    kept = output_dir / f"{METRICS}.unreadable"
    shutil.copyfile(output_dir / METRICS, kept)
    return (
        f"{output_dir / METRICS}: dropped {len(unreadable):,} lines that cannot be read; the file was copied to {kept}"
    )


def _parsed(text: str) -> dict[str, Any]:
    """Return a line of metrics.jsonl; nothing without a step, or where the log and the plots expect numbers."""
    try:
        line = json.loads(text, object_hook=_with_floats)
        numbers = [line[key] for key in ("tokens", *_PLOTTED) if key in line]
        valid = type(line["step"]) is int and ("tokens" in line or "train_loss" not in line)
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    # Integers of hundreds of digits are no floats.
    is_number = all(type(number) is float or (type(number) is int and abs(number) < 1 << 63) for number in numbers)
    return line if valid and is_number else {}


def _with_floats(values: dict[str, Any]) -> dict[str, Any]:
    return {key: float(v) if isinstance(v, str) and v in _NOT_FINITE else v for key, v in values.items()}


def metrics_line(values: Mapping[str, Any]) -> str:
    """Return a line of metrics.jsonl; a non-finite float becomes a string that `float()` can parse (as in protobuf)."""
    valid = {
        key: value if not isinstance(value, float) or math.isfinite(value) else json.dumps(value)
        for key, value in values.items()
    }
    return json.dumps(valid) + "\n"


def samples_section(step: int, texts: Sequence[str]) -> str:
    """Return a section of samples.txt: each line of a sample follows "  | "; an empty line separates two samples."""
    return "\n\n".join([f"step {step}", *map(quoted, texts)]) + "\n\n"


def quoted(sample: str) -> str:
    """Return a sample as it is printed."""
    return "  | " + sample.strip("\n").replace("\n", "\n  | ")


def _read_samples(output_dir: Path) -> dict[int, list[str]]:
    """Return the texts of a run's samples.txt by step; truncated headings are skipped."""
    parts = re.split(r"^step (\d{1,18})\n\n", _read(output_dir / "samples.txt"), flags=re.MULTILINE)[1:]
    return {int(step): _samples(section) for step, section in zip(parts[::2], parts[1::2], strict=True)}


def _samples(section: str) -> list[str]:
    blocks = [block.split("\n") for block in section.split("\n\n") if block.startswith("  | ")]
    return ["\n".join(line[4:] for line in block if line.startswith("  | ")) for block in blocks]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
