"""The files that a run writes."""

import errno
import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

import pytest

from training.monitoring.run_history import read_metrics
from training.monitoring.run_log import RunLog


def training_line(step: int, loss: float = 3.0) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 100,
        "train_loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 1000.0,
        "mfu": None,
    }


def open_log(folder: Path, first_step: int = 0) -> RunLog:
    return RunLog(folder, enabled=True, first_step=first_step, total_steps=10)


def test_log_txt_has_three_columns_for_plotting(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.training(training_line(1, 3.28411))
    log.record({"step": 1, "tokens": 100, "val_loss": 3.29244, "val_tokens": 10})
    log.close()
    assert (tmp_path / "log.txt").read_text() == "1 train 3.2841\n1 val 3.2924\n"


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 8):
        log.training(training_line(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')  # torn by a crash
    log = open_log(tmp_path, first_step=5)
    for step in range(6, 11):
        log.training(training_line(step, 2.0))
    log.close()
    metrics = read_metrics(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, 11))
    assert [line["train_loss"] for line in metrics] == [3.0] * 5 + [2.0] * 5
    columns = (tmp_path / "log.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in columns] == list(range(1, 11))


def test_everything_that_is_printed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.print("hello")
    log.training(training_line(1))
    log.close()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "train.log").read_text()
    assert printed.startswith("hello\nstep 1/10  loss 3.0000")


def test_non_finite_loss_is_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.training(training_line(1, float("nan")))
    log.close()
    # JSON has no word for it: a string, of which reading makes a number again.
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train_loss"] == "NaN"
    assert math.isnan(read_metrics(tmp_path)[0]["train_loss"])
    assert "loss nan" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text() == "1 train nan\n"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, enabled=False, first_step=0, total_steps=10)
    log.print("x")
    log.advance()
    log.training(training_line(1))
    log.flush_to_disk()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_log_line_has_the_values_of_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.training({**training_line(1), "mfu": 0.4981, "memory_gib": 12.34}, seconds_left=3700)
    log.close()
    assert capsys.readouterr().out == (
        "step 1/10  loss 3.0000 ~3.0000  lr 1.00e-03  norm 1.00  1.00k tok/s  MFU 49.8%  12.3 GiB  1 h 02 min left\n"
    )


def test_progress_bar_on_a_terminal_has_the_values_of_the_log_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    log = open_log(tmp_path)
    log.advance()
    log.training({**training_line(1), "mfu": 0.4981, "memory_gib": 12.34}, seconds_left=240)
    time.sleep(0.15)  # tqdm draws at most every 0.1 s
    log.advance()
    log.close()
    drawn = capsys.readouterr().err
    values = "loss 3.0000 ~3.0000  lr 1.00e-03  norm 1.00  1.00k tok/s  MFU 49.8%  12.3 GiB"
    assert values in drawn
    assert len(values) < 80
    assert "4.0 min left" in drawn
    assert values in (tmp_path / "train.log").read_text()


def test_smoothed_loss_continues_after_a_resume(tmp_path: Path) -> None:
    losses = [3.0, 2.5, float("nan"), 2.0, 1.5]
    for name, parts in (("complete", [losses]), ("parted", [losses[:2], losses[2:]])):
        (tmp_path / name).mkdir()
        step = 0
        for part in parts:
            log = open_log(tmp_path / name, first_step=step)
            for loss in part:
                step += 1
                log.training(training_line(step, loss))
            log.close()
    complete, parted = (
        [line["smoothed_loss"] for line in read_metrics(tmp_path / name)] for name in ("complete", "parted")
    )
    assert repr(complete) == repr(parted)


def test_smoothed_loss_starts_at_the_first_loss_and_skips_non_finite_ones(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    losses = [4.0, 4.0, math.nan, 4.0, 3.0]
    smoothed = [log.training(training_line(step, loss))["smoothed_loss"] for step, loss in enumerate(losses, start=1)]
    log.close()
    last = (0.1 * 4.0 * (0.9**3 + 0.9**2 + 0.9) + 0.1 * 3.0) / (1 - 0.9**4)
    assert smoothed == pytest.approx([4.0, 4.0, math.nan, 4.0, last], nan_ok=True)


def test_results_of_tasks_are_lines_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    values = {"step": 4, "tokens": 400, "hellaswag_acc_norm": 0.2955, "lambada_acc": 0.3256}
    log.record(values, "hellaswag_acc_norm 0.2955")
    log.record({"step": 5, "tokens": 500, "cbt_cn_acc": 0.87})
    log.close()
    assert read_metrics(tmp_path)[0] == values
    assert (tmp_path / "log.txt").read_text() == "4 hella 0.2955\n"
    assert capsys.readouterr().out.startswith("step 4  hellaswag_acc_norm 0.2955\n")


def test_samples_of_a_step_are_written_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for first_step, steps in ((0, (5, 10)), (5, (5, 10)), (10, (10,))):  # stopped after step 5, and again at the end
        log = open_log(tmp_path, first_step=first_step)
        for step in steps:
            log.samples(step, ["One\nstep 99 in the text", "Two"])
        log.close()
    section = "  | One\n  | step 99 in the text\n\n  | Two\n\n"
    assert (tmp_path / "samples.txt").read_text() == f"step 5\n\n{section}step 10\n\n{section}"
    assert capsys.readouterr().out.count("  | Two") == 3


def test_truncated_samples_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "samples.txt").write_bytes(b"step 5\n\n  | One\n\nstep 10\n\n  | Zw\xc3\nstep ")
    log = open_log(tmp_path, first_step=10)
    log.close()
    assert (tmp_path / "samples.txt").read_text().startswith("step 5\n\n  | One\n\nstep 10\n")
    assert not (tmp_path / "samples.txt").read_text().endswith("step ")


@pytest.mark.parametrize(
    ("rate", "words"), [(950.4, "950"), (13_800, "13.8k"), (182_400, "182k"), (999_900, "1.00M"), (1_750_000, "1.75M")]
)
def test_rates_are_short_enough_for_a_line(
    rate: float, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path)
    log.training({**training_line(1), "tokens_per_second": rate})
    log.close()
    assert f"  {words} tok/s" in capsys.readouterr().out


class _FullDisk:
    """A file on a disk that takes nothing while it is full."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.name, self.is_full = file, file.name, True

    def flush(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk_neither_ends_the_run_nor_loses_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(tmp_path, enabled=True, first_step=0, total_steps=4)
    disk = _FullDisk(log._files["metrics.jsonl"])
    monkeypatch.setitem(log._files, "metrics.jsonl", disk)
    for step in (1, 2):
        log.record({"step": step, "tokens": step, "lambada_acc": 0.5})
    with pytest.raises(OSError, match="No space left"):
        log.flush_to_disk()
    assert capsys.readouterr().out.count("free some space; training continues") == 1
    disk.is_full = False
    log.record({"step": 3, "tokens": 3, "lambada_acc": 0.5})
    log.flush_to_disk()
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
