"""What a run says while it goes: progress bar, metrics.jsonl, log.txt, train.log, and its speed.

Only the main process writes. A resumed run first drops the lines behind its checkpoint, so every step stands once.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from training.atomic import write_whole

# Dense bf16 matrix products, FLOP/s, from the vendors' data sheets. Longer names first: "H100 PCIe" is an "H100" too.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(*, parameters: int, n_layer: int, n_embd: int, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass: 6N + 12·L·n_embd·T (PaLM paper, appendix B)."""
    return 6.0 * parameters + 12.0 * n_layer * n_embd * seq_len


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of one device by its name, or None for a device that the table does not know."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


class Throughput:
    """Tokens per second of training itself: pauses for validation, samples and checkpoints are left out."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._paused = 0.0
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished step."""
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside out of account."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def take(self) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        rate = self._tokens / seconds if seconds > 0 else 0.0
        self._since, self._paused, self._tokens = now, 0.0, 0
        return rate


class RunLog:
    """The files and the terminal of a run; every method does nothing on other processes than the main one.

    Arguments:
        output_dir: the run's folder, which exists.
        enabled: whether this is the main process.
        first_step: lines of this step and later ones, left by a run that died behind its checkpoint, are dropped.
        total_steps: length of the progress bar.
    """

    def __init__(self, output_dir: Path, *, enabled: bool, first_step: int, total_steps: int) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._metrics = _reopened(output_dir / "metrics.jsonl", lambda line: json.loads(line)["step"], first_step)
        self._columns = _reopened(output_dir / "log.txt", lambda line: int(line.split()[0]), first_step)
        self._printed = (output_dir / "train.log").open("a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{desc}{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        self._started = time.perf_counter()
        self._first_step = first_step
        self._total_steps = total_steps

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one, and keep it in train.log."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
            self._keep(text)

    def _keep(self, text: str) -> None:
        self._printed.write(text + "\n")
        self._printed.flush()

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.enabled:
            self._bar.update()

    def training(self, values: Mapping[str, Any]) -> None:
        """Record a logged step: a line of metrics.jsonl, one of log.txt, and the bar (without one, a line)."""
        if not self.enabled:
            return
        step, loss, rate = values["step"], values["train_loss"], values["tokens_per_second"]
        self._record(values, "train", loss)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
        seconds = time.perf_counter() - self._started
        left = seconds / max(1, step - self._first_step) * (self._total_steps - step)
        line = (
            f"step {step}/{self._total_steps}  loss {loss:.4f}  lr {values['learning_rate']:.2e}  "
            f"norm {values['grad_norm']:.2f}  {rate:,.0f} tokens/s  {left / 60:.1f} min left"
        )
        if self._bar.disable:
            self.say(line)
        else:
            self._keep(line)

    def validation(self, values: Mapping[str, Any]) -> None:
        """Record a validation: a line of metrics.jsonl, one of log.txt, and one on the terminal."""
        if not self.enabled:
            return
        self._record(values, "val", values["val_loss"])
        per_byte = values.get("bits_per_byte")
        self.say(
            f"step {values['step']}  validation loss {values['val_loss']:.4f} nats per token"
            + (f", {per_byte:.4f} bits per byte" if per_byte is not None else "")
        )

    def _record(self, values: Mapping[str, Any], stream: str, value: float) -> None:
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        self._columns.write(f"{values['step']} {stream} {value:.4f}\n")
        self._columns.flush()

    def flush_to_disk(self) -> None:
        """Make what was recorded so far survive a crash; called before a checkpoint counts."""
        if self.enabled:
            for file in (self._metrics, self._columns):
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the bar and close the files."""
        if self.enabled:
            self._bar.close()
            for file in (self._metrics, self._columns, self._printed):
                file.close()


def _reopened(path: Path, step_of: Callable[[str], int], last_step: int) -> TextIO:
    """The file opened for appending; lines behind `last_step` and those that a crash tore are dropped."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _is_readable(line, step_of) and step_of(line) <= last_step]
        if len(kept) < len(lines):
            write_whole(path, lambda stream: stream.write("".join(kept).encode()))
    return path.open("a", encoding="utf-8")


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; those that cannot be read are left out."""
    path = output_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [json.loads(line) for line in lines if _is_readable(line, json.loads)]


def _is_readable(line: str, read: Callable[[str], Any]) -> bool:
    try:
        read(line)
    except (ValueError, KeyError, TypeError, IndexError):
        return False
    return line.endswith("\n")
