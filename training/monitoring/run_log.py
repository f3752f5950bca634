"""The log of a run: progress bar, metrics.jsonl, log.txt, train.log and samples.txt.

Only rank 0 writes. A resumed run first drops lines after its checkpoint, so that each step is logged once.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from common.atomic_files import write_atomically
from common.durations import format_duration
from common.progress import Progress
from training.monitoring.run_history import RunHistory, is_complete_line

_BUFFER_BYTES = 1 << 20  # some thousand lines
_SMOOTHING = 0.9  # weight of the past in the smoothed loss, which averages the last ten or twenty logged steps


class Smoothed:
    """Exponential moving average with bias correction (as in Adam)."""

    def __init__(self, weight: float) -> None:
        self._weight, self._sum, self._count = weight, 0.0, 0

    def add(self, value: float) -> float:
        """Add a value and return the average; a non-finite value is returned and not added."""
        if not math.isfinite(value):
            return value
        self._count += 1
        self._sum = self._weight * self._sum + (1.0 - self._weight) * value
        return self._sum / (1.0 - self._weight**self._count)


class RunLog:
    """The files and the terminal output of a run; on ranks other than 0, all methods do nothing.

    Args:
        output_dir: the run folder, which exists.
        enabled: whether this is rank 0.
        first_step: later lines are dropped; a run that was killed after its checkpoint leaves some.
        total_steps: length of the progress bar.

    Attributes:
        history: what was recorded by all starts of the run; empty on other ranks.
    """

    def __init__(self, output_dir: Path, *, enabled: bool, first_step: int, total_steps: int) -> None:
        self.enabled = enabled
        self.history = RunHistory()
        if not enabled:
            return
        self._metrics = _reopened(output_dir / "metrics.jsonl", lambda line: json.loads(line)["step"], first_step)
        self._columns = _reopened(output_dir / "log.txt", lambda line: int(line.split()[0]), first_step)
        self._samples, self._last_samples = _reopened_samples(output_dir / "samples.txt", first_step)
        self._printed = _appending(output_dir / "train.log")
        self._unwritten: set[str] = set()
        self._smoothed = Smoothed(_SMOOTHING)
        self.history = RunHistory.load(output_dir)
        for line in self.history.metrics:
            if "train_loss" in line:
                self._smoothed.add(line["train_loss"])
        self._progress = Progress(
            total=total_steps,
            initial=first_step,
            status_below=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}  {elapsed}{desc}",
        )
        self._total_steps = total_steps

    def print(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, and append it to train.log."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            self._append(self._printed, text + "\n")

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        if self.enabled:
            self._progress.update()

    def training(self, values: Mapping[str, Any], seconds_left: float = math.nan) -> dict[str, Any]:
        """Record a logged step in metrics.jsonl and log.txt, and show it in the progress bar or else as a line.

        Returns:
            The values with `smoothed_loss`; no values on other ranks.
        """
        if not self.enabled:
            return {}
        recorded: dict[str, Any] = {}
        for key, value in values.items():
            recorded[key] = value
            if key == "train_loss":
                recorded["smoothed_loss"] = self._smoothed.add(value)
        self._record(recorded, {"train": values["train_loss"]})
        status, left = _status(recorded), f"{format_duration(seconds_left)} left"
        line = f"step {values['step']}/{self._total_steps}  {status}  {left}"
        if self._progress.has_bar:
            self._progress.describe(f"  {left}")
            self._progress.update(0, status)
            self._append(self._printed, line + "\n")
        else:
            self.print(line)
        return recorded

    def guarded(self, values: Mapping[str, Any]) -> None:
        """Record a spike or a skipped update in metrics.jsonl, and print it."""
        if not self.enabled:
            return
        self._write(values)
        first, last = values["samples"]
        what = "update skipped" if values["guard"] == "skipped" else "spike"
        self.print(
            f"step {values['step']}  {what}: loss {values['loss']:.4f}  norm {values['grad_norm']:.2f}  "
            f"samples {first} to {last}"
        )

    def validation(self, values: Mapping[str, Any]) -> None:
        """Record a validation in metrics.jsonl and log.txt, and print it."""
        if not self.enabled:
            return
        self._record(values, {"val": values["val_loss"]})
        per_byte = values.get("bits_per_byte")
        self.print(
            f"step {values['step']}  validation loss {values['val_loss']:.4f} nats per token"
            + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
        )

    def tasks(self, values: Mapping[str, Any]) -> None:
        """Record results of evaluation tasks in metrics.jsonl, and print them.

        Args:
            values: `step`, `tokens`, and results by task and metric: `hellaswag_acc_norm`, `lambada_acc`, `cbt_cn_acc`,
                … `hellaswag_acc_norm` also goes to log.txt, as `step hella 0.2955`.
        """
        if not self.enabled:
            return
        self._record(values, {"hella": values["hellaswag_acc_norm"]} if "hellaswag_acc_norm" in values else {})
        results = (f"{key} {value:.4f}" for key, value in values.items() if key not in ("step", "tokens"))
        self.print(f"step {values['step']}  " + "  ".join(results))

    def samples(self, step: int, texts: Sequence[str], *, show: bool = True) -> None:
        """Append samples to samples.txt, once per step; with `show`, print them."""
        if not self.enabled or step <= self._last_samples:
            return
        self.history.samples[step] = list(texts)
        shown = ["  | " + text.strip("\n").replace("\n", "\n  | ") for text in texts]
        for text in shown if show else ():
            self.print(text)
        self._append(self._samples, "\n\n".join([f"step {step}", *shown]) + "\n\n")
        self._last_samples = step

    def has_samples(self, step: int) -> bool:
        """Whether samples.txt has samples of `step`; False on other ranks."""
        return self.enabled and step <= self._last_samples

    def _record(self, values: Mapping[str, Any], columns: Mapping[str, float]) -> None:
        self._write(values)
        for stream, value in columns.items():
            self._append(self._columns, f"{values['step']} {stream} {value:.4f}\n")

    def _write(self, values: Mapping[str, Any]) -> None:
        self.history.metrics.append(dict(values))
        line = json.dumps({key: _json_value(value) for key, value in values.items()}, allow_nan=False)
        self._append(self._metrics, line + "\n")

    def _append(self, file: TextIO, text: str) -> None:
        """Write to a file of the run; on a full disk, the text stays in the file's buffer until there is space."""
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if not self._unwritten:
                tqdm.write(
                    f"cannot write {file.name} ({error.strerror}): free some space; training continues, and "
                    "unwritten lines are kept in memory"
                )
            self._unwritten.add(file.name)
        else:
            self._unwritten.discard(file.name)

    def flush_to_disk(self) -> None:
        """Force all lines to disk; called before a checkpoint gets its final name.

        Raises:
            OSError: the disk is full; a checkpoint must not appear without its lines in metrics.jsonl.
        """
        if self.enabled:
            for file in (self._metrics, self._columns, self._samples):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close the progress bar and the files."""
        if self.enabled:
            self._progress.close()
            for file in (self._metrics, self._columns, self._samples, self._printed):
                try:
                    file.close()
                except OSError as error:
                    print(f"could not write the last lines of {file.name} ({error.strerror})", file=sys.stderr)


def _status(values: Mapping[str, Any]) -> str:
    """The values of a logged step, in less than 80 columns."""
    mfu, memory = values.get("mfu"), values.get("memory_gib")
    parts = [
        f"loss {values['train_loss']:.4f} ~{values['smoothed_loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"norm {values['grad_norm']:.2f}",
        f"{_short(values['tokens_per_second'])} tok/s",
    ]
    parts += [f"MFU {mfu:.1%}"] if mfu is not None else []
    parts += [f"{memory:.1f} GiB"] if memory is not None else []
    return "  ".join(parts)


def _short(rate: float) -> str:
    """A rate with at least three digits: `13,800`, `182k`, `1.75M`."""
    if rate < 1e5:
        return f"{rate:,.0f}"
    return f"{rate / 1e3:.0f}k" if rate < 999_500 else f"{rate / 1e6:.2f}M"


def _reopened_samples(path: Path, last_step: int) -> tuple[TextIO, int]:
    """samples.txt opened for appending, without samples after `last_step`, and the last step that has samples."""
    kept: list[str] = []
    last, keep = -1, True
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ()
    for line in lines:
        if line.startswith("step "):
            number = line.split()[1:]
            step = int(number[0]) if number and number[0].isdecimal() else last_step + 1  # truncated by a crash
            keep = step <= last_step
            last = step if keep else last
        kept += [line] if keep else []
    if path.exists():
        write_atomically(path, "".join(kept))
    return _appending(path), last


def _reopened(path: Path, step_of: Callable[[str], int], last_step: int) -> TextIO:
    """The file opened for appending, without truncated lines and lines after `last_step`."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if is_complete_line(line, step_of) and step_of(line) <= last_step]
        if len(kept) < len(lines):
            write_atomically(path, "".join(kept))
    return _appending(path)


def _appending(path: Path) -> TextIO:
    """The file opened for appending, with a buffer for lines that cannot be written while the disk is full."""
    return path.open("a", encoding="utf-8", buffering=_BUFFER_BYTES)


def _json_value(value: Any) -> Any:
    """A non-finite float as a string that `float()` can parse (as in protobuf's JSON)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
