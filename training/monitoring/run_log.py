"""The log of a run: progress bar, metrics.jsonl, log.txt, train.log and samples.txt.

Only rank 0 writes. A resumed run first drops lines after its checkpoint, so that each step is logged once.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from tqdm.std import EMA  # type: ignore[attr-defined]

from common.atomic_files import write_atomically
from common.durations import format_duration
from common.progress import Progress
from training.monitoring.run_history import (
    RunHistory,
    metrics_line,
    quoted,
    samples_section,
    set_aside_unreadable_metrics,
)

_BUFFER_BYTES = 1 << 20  # some thousand lines, which cannot be written while the disk is full
_SMOOTHING = 0.1  # weight of a new loss in the smoothed loss, which averages the last ten or twenty logged steps
_COLUMNS = {"train_loss": "train", "val_loss": "val", "hellaswag_acc_norm": "hella"}  # log.txt's names of metrics


class RunLog:
    """The files and the terminal output of a run; only rank 0 writes and prints.

    Lines after `first_step` are dropped: a run that was killed after its checkpoint leaves some. The `history` is what
    was recorded by all starts of the run; on ranks that are not `enabled`, by this start.
    """

    def __init__(self, output_dir: Path, *, enabled: bool, first_step: int, total_steps: int) -> None:
        self.enabled = enabled
        self.history = RunHistory.load(output_dir, first_step) if enabled else RunHistory()
        self._smoothed = EMA(_SMOOTHING)
        for line in self.history.metrics:
            if "train_loss" in line:
                self._smooth(line["train_loss"])
        self._files: dict[str, TextIO] = {}
        self._unwritten: set[str] = set()
        dropped = None
        if enabled:
            dropped = set_aside_unreadable_metrics(output_dir, self.history.unreadable)
            contents = {
                "metrics.jsonl": map(metrics_line, self.history.metrics),
                "log.txt": map(_columns, self.history.metrics),
                "samples.txt": starmap(samples_section, self.history.samples.items()),
            }
            for name, lines in contents.items():
                write_atomically(output_dir / name, "".join(lines))
            for name in (*contents, "train.log"):
                self._files[name] = (output_dir / name).open(
                    "a", encoding="utf-8", errors="backslashreplace", buffering=_BUFFER_BYTES
                )
        self._progress = Progress(
            total=total_steps,
            initial=first_step,
            enabled=enabled,
            status_below=True,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}  {elapsed}{desc}",
        )
        self._total_steps = total_steps
        if dropped:
            self.print(dropped)

    def print(self, text: str) -> None:
        """Print a line, above the progress bar if there is one, and append it to train.log."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            self._append("train.log", text + "\n")

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self._progress.update()

    def training(self, values: Mapping[str, Any], seconds_left: float = math.nan) -> dict[str, Any]:
        """Record a logged step, show it in the progress bar or else as a line, and return it with `smoothed_loss`."""
        recorded = {**values, "smoothed_loss": self._smooth(values["train_loss"])}
        self.record(recorded)
        status, left = _status(recorded), f"{format_duration(seconds_left)} left"
        line = f"step {values['step']}/{self._total_steps}  {status}  {left}"
        if self._progress.has_bar:
            self._progress.describe(f"  {left}")
            self._progress.update(0, status)
            self._append("train.log", line + "\n")
        else:
            self.print(line)
        return recorded

    def _smooth(self, loss: float) -> float:
        """The smoothed loss; a non-finite loss is returned and not averaged."""
        return float(self._smoothed(loss)) if math.isfinite(loss) else loss

    def record(self, values: Mapping[str, Any], text: str | None = None) -> None:
        """Append values, with `step`, to metrics.jsonl and log.txt, and print what `text` says of them."""
        self.history.metrics.append(dict(values))
        self._append("metrics.jsonl", metrics_line(values))
        self._append("log.txt", _columns(values))
        if text is not None:
            self.print(f"step {values['step']}  {text}")

    def samples(self, step: int, texts: Sequence[str], *, show: bool = True) -> None:
        """Append samples to samples.txt, once per step; with `show`, print them."""
        if step in self.history.samples:
            return
        self.history.samples[step] = list(texts)
        for text in texts if show else ():
            self.print(quoted(text))
        self._append("samples.txt", samples_section(step, texts))

    def _append(self, name: str, text: str) -> None:
        """Write to a file of the run; on a full disk, the text stays in the file's buffer until there is space."""
        if not self.enabled:
            return
        file = self._files[name]
        try:
            file.write(text)
            file.flush()
        except OSError as error:
            if not self._unwritten:
                tqdm.write(
                    f"cannot write {file.name} ({error.strerror}): free some space; training continues, and "
                    "unwritten lines are kept in memory"
                )
            self._unwritten.add(name)
        else:
            self._unwritten.discard(name)

    def flush_to_disk(self) -> None:
        """Force all lines to disk; raise an OSError if it is full."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the progress bar and the files."""
        self._progress.close()
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:
                print(f"could not write the last lines of {file.name} ({error.strerror})", file=sys.stderr)


def _columns(values: Mapping[str, Any]) -> str:
    """The lines of log.txt for a line of metrics.jsonl."""
    return "".join(f"{values['step']} {name} {values[key]:.4f}\n" for key, name in _COLUMNS.items() if key in values)


def _status(values: Mapping[str, Any]) -> str:
    """The values of a logged step, in less than 80 columns."""
    mfu, memory = values.get("mfu"), values.get("memory_gib")
    parts = [
        f"loss {values['train_loss']:.4f} ~{values['smoothed_loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"norm {values['grad_norm']:.2f}",
        f"{tqdm.format_sizeof(values['tokens_per_second'])} tok/s",
    ]
    parts += [f"MFU {mfu:.1%}"] if mfu is not None else []
    parts += [f"{memory:.1f} GiB"] if memory is not None else []
    return "  ".join(parts)
