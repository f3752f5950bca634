"""What a run says while it goes: progress bar, metrics.jsonl, log.txt, train.log and samples.txt.

Only the main process writes. A resumed run first drops the lines behind its checkpoint, so every step stands once.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from common.atomic_files import write_atomically
from common.durations import format_duration
from training.monitoring.run_history import RunHistory, is_complete_line

_UNWRITTEN_BYTES = 1 << 20  # some thousand lines

_SMOOTHING = 0.9  # weight of the past in the smoothed loss: it tells of the last ten or twenty logged steps


class Smoothed:
    """Exponential moving average, corrected for its beginning (as Adam's), so that it does not start at zero."""

    def __init__(self, weight: float) -> None:
        self._weight, self._sum, self._count = weight, 0.0, 0

    def add(self, value: float) -> float:
        """The average with one more value; one that is not finite is given back, and leaves the average as it was."""
        if not math.isfinite(value):
            return value
        self._count += 1
        self._sum = self._weight * self._sum + (1.0 - self._weight) * value
        return self._sum / (1.0 - self._weight**self._count)


class RunLog:
    """The files and the terminal of a run; every method does nothing on other processes than the main one.

    Arguments:
        output_dir: the run's folder, which exists.
        enabled: whether this is the main process.
        first_step: lines of this step and later ones, left by a run that died behind its checkpoint, are dropped.
        total_steps: length of the progress bar.

    Attributes:
        history: what was recorded, over all starts of the run; empty on other processes.
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
        on_terminal = _is_terminal(sys.stderr)
        tqdm.set_lock(threading.RLock())  # its own is one between processes, which a killed run leaves behind
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            dynamic_ncols=True,
            disable=not on_terminal,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}  {elapsed}{desc}",
        )
        # A line of its own: beside the bar, a terminal of 80 columns would cut the figures off.
        self._figures = tqdm(total=0, position=1, dynamic_ncols=True, disable=not on_terminal, bar_format="{desc}")
        self._total_steps = total_steps

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one, and keep it in train.log."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            self._keep(text)

    def _keep(self, text: str) -> None:
        self._append(self._printed, text + "\n")

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.enabled:
            self._bar.update()

    def training(self, values: Mapping[str, Any], seconds_left: float = math.nan) -> dict[str, Any]:
        """Record a logged step: a line of metrics.jsonl, one of log.txt, and the bar (without one, a line).

        Returns:
            The values as recorded, `smoothed_loss` among them; no values on other processes.
        """
        if not self.enabled:
            return {}
        recorded: dict[str, Any] = {}
        for key, value in values.items():
            recorded[key] = value
            if key == "train_loss":
                recorded["smoothed_loss"] = self._smoothed.add(value)
        self._record(recorded, {"train": values["train_loss"]})
        figures, left = _figures(recorded), f"{format_duration(seconds_left)} left"
        line = f"step {values['step']}/{self._total_steps}  {figures}  {left}"
        if self._bar.disable:
            self.say(line)
        else:
            self._bar.set_description_str(f"  {left}", refresh=False)
            self._figures.set_description_str(figures)
            self._keep(line)
        return recorded

    def guarded(self, values: Mapping[str, Any]) -> None:
        """Record what the guard found in a step: a line of metrics.jsonl, and one on the terminal."""
        if not self.enabled:
            return
        self._write(values)
        first, last = values["samples"]
        what = "update skipped" if values["guard"] == "skipped" else "spike"
        self.say(
            f"step {values['step']}  {what}: loss {values['loss']:.4f}  norm {values['grad_norm']:.2f}  "
            f"samples {first} to {last}"
        )

    def validation(self, values: Mapping[str, Any]) -> None:
        """Record a validation: a line of metrics.jsonl, one of log.txt, and one on the terminal."""
        if not self.enabled:
            return
        self._record(values, {"val": values["val_loss"]})
        per_byte = values.get("bits_per_byte")
        self.say(
            f"step {values['step']}  validation loss {values['val_loss']:.4f} nats per token"
            + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
        )

    def tasks(self, values: Mapping[str, Any]) -> None:
        """Record results of evaluation tasks: a line of metrics.jsonl, and one on the terminal.

        Arguments:
            values: `step`, `tokens`, and results by task and metric: `hellaswag_acc_norm`, `lambada_acc`, `cbt_cn_acc`,
                … HellaSwag's, in the completion style, is also a line of log.txt, `step hella 0.2955`.
        """
        if not self.enabled:
            return
        self._record(values, {"hella": values["hellaswag_acc_norm"]} if "hellaswag_acc_norm" in values else {})
        results = (f"{key} {value:.4f}" for key, value in values.items() if key not in ("step", "tokens"))
        self.say(f"step {values['step']}  " + "  ".join(results))

    def samples(self, step: int, texts: Sequence[str], *, show: bool = True) -> None:
        """Keep samples of the model after `step` in samples.txt, once for each step, and show them."""
        if not self.enabled or step <= self._last_samples:
            return
        self.history.samples[step] = list(texts)
        shown = ["  | " + text.strip("\n").replace("\n", "\n  | ") for text in texts]
        for text in shown if show else ():
            self.say(text)
        self._append(self._samples, "\n\n".join([f"step {step}", *shown]) + "\n\n")
        self._last_samples = step

    def has_samples(self, step: int) -> bool:
        """Whether samples of the model after `step` are kept already; never on other processes."""
        return self.enabled and step <= self._last_samples

    def _record(self, values: Mapping[str, Any], columns: Mapping[str, float]) -> None:
        self._write(values)
        for stream, value in columns.items():
            self._append(self._columns, f"{values['step']} {stream} {value:.4f}\n")

    def _write(self, values: Mapping[str, Any]) -> None:
        self.history.metrics.append(dict(values))
        line = json.dumps({key: _strict(value) for key, value in values.items()}, allow_nan=False)
        self._append(self._metrics, line + "\n")

    def _append(self, file: TextIO, text: str) -> None:
        """Write to a file of the run; what a full disk does not take stays in the file's buffer until it does."""
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if not self._unwritten:
                tqdm.write(
                    f"cannot write {file.name} ({error.strerror}): free some space; training goes on, and what is not "
                    "written is kept in memory"
                )
            self._unwritten.add(file.name)
        else:
            self._unwritten.discard(file.name)

    def flush_to_disk(self) -> None:
        """Make what was recorded so far survive a crash; called before a checkpoint counts.

        Raises:
            OSError: the disk is full; a checkpoint without its lines in the metrics must not count.
        """
        if self.enabled:
            for file in (self._metrics, self._columns, self._samples):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the bar and close the files."""
        if self.enabled:
            self._figures.close()
            self._bar.close()
            for file in (self._metrics, self._columns, self._samples, self._printed):
                try:
                    file.close()
                except OSError as error:
                    print(f"{file.name} lacks its last lines ({error.strerror})", file=sys.stderr)


def _figures(values: Mapping[str, Any]) -> str:
    """The figures of a logged step, in less than 80 columns."""
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
    """A rate in three or more digits: `13,800`, `182k`, `1.75M`."""
    if rate < 1e5:
        return f"{rate:,.0f}"
    return f"{rate / 1e3:.0f}k" if rate < 999_500 else f"{rate / 1e6:.2f}M"


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be shown: not on a terminal without a height, as some containers have, where tqdm hides it."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).lines > 0
    except (OSError, ValueError):
        return True


def _reopened_samples(path: Path, last_step: int) -> tuple[TextIO, int]:
    """samples.txt opened for appending without the samples behind `last_step`, and the last step that has some."""
    kept: list[str] = []
    last, keep = -1, True
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ()
    for line in lines:
        if line.startswith("step "):
            number = line.split()[1:]
            step = int(number[0]) if number and number[0].isdecimal() else last_step + 1  # torn by a crash
            keep = step <= last_step
            last = step if keep else last
        kept += [line] if keep else []
    if path.exists():
        write_atomically(path, "".join(kept))
    return _appending(path), last


def _reopened(path: Path, step_of: Callable[[str], int], last_step: int) -> TextIO:
    """The file opened for appending; lines behind `last_step` and those that a crash tore are dropped."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if is_complete_line(line, step_of) and step_of(line) <= last_step]
        if len(kept) < len(lines):
            write_atomically(path, "".join(kept))
    return _appending(path)


def _appending(path: Path) -> TextIO:
    """The file opened for appending, with a buffer that holds what is not written while the disk is full."""
    return path.open("a", encoding="utf-8", buffering=_UNWRITTEN_BYTES)


def _strict(value: Any) -> Any:
    """A number that JSON has no word for as a string, `float()` of which gives it back (as protobuf's JSON has it)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
