"""What a run writes down while it goes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from training import progress
from training.progress import RunLog, Throughput, flops_per_token, peak_flops, read_metrics


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
    log.validation({"step": 1, "tokens": 100, "val_loss": 3.29244, "val_tokens": 10})
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
    log.say("hello")
    log.training(training_line(1))
    log.close()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "train.log").read_text()
    assert printed.startswith("hello\nstep 1/10  loss 3.0000")


def test_a_loss_that_is_not_a_number_is_not_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    log.training(training_line(1, float("nan")))
    log.close()
    assert math.isnan(json.loads((tmp_path / "metrics.jsonl").read_text())["train_loss"])
    assert "loss nan" in capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text() == "1 train nan\n"


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, enabled=False, first_step=0, total_steps=10)
    log.say("x")
    log.advance()
    log.training(training_line(1))
    log.flush_to_disk()
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_throughput_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 30.0, 40.0, 41.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    throughput = Throughput()
    throughput.add(600)
    with throughput.pause():  # from 10 to 30
        pass
    assert throughput.take() == 600 / 20  # 40 seconds, 20 of them paused
    throughput.add(5)
    assert throughput.take() == 5.0  # counted anew


def test_flops_of_the_124m_model_are_those_of_the_literature() -> None:
    flops = flops_per_token(parameters=124_439_808, n_layer=12, n_embd=768, seq_len=1024)
    assert flops == pytest.approx(0.86e9, rel=0.005)


def test_peaks_are_found_by_the_names_that_cuda_gives() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("Some CPU") is None
