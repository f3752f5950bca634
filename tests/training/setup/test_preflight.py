"""Preflight: measures a run before it starts, and writes nothing."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.launching import TRAIN, launched
from support.tiny_models import one_thread  # noqa: F401

from common.cli_errors import InputError
from training.loop import train
from training.recipe import Recipe
from training.setup import preflight as module
from training.setup.preflight import preflight
from training.step.batch_plan import plan_batch

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def lines_of(printed: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in printed.splitlines() if re.match(r"[a-z-]+ {2,}", line)}


def test_preflight_reports_memory_time_and_cost_and_writes_nothing(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tokenizer="gpt2", data_dir=str(tmp_path / "absent"), dropout=0.1, seq_len=16)
    preflight(recipe, price_per_gpu_hour=2.0)
    report = lines_of(capsys.readouterr().out)
    assert report["processes"].startswith("1 on 1 node: 1 × ")
    assert report["batch"] == "256 tokens a step = 4 × 16 × 1 process × 4 accumulated"
    assert "vocabulary 50,257, in fp32" in report["model"]
    # 1,634,240 parameters: 6.23 MiB, with a gradient and two moments of that size.
    assert re.match(r"estimated \d+\.\d MiB per device: weights 6\.2 MiB, gradients 6\.2 MiB, opt", report["memory"])
    assert report["data"].startswith(f"nothing in {tmp_path / 'absent'} yet; training would tokenize ")
    assert report["length"] == "12 steps, 3,072 tokens"
    assert re.match(r"[\d,]+ tokens/s, .* s per step: median of 3 steps with 4 × 16 tokens", report["speed"])
    assert re.match(
        r"0\.\d\d\d\d hours \(.* s\) with validation, without samples, eval_tasks and checkpoints",
        report["time"],
    )
    assert report["cost"].endswith("at 2.00 per GPU hour on 1")
    assert list(tmp_path.iterdir()) == []


def test_resumed_run_is_counted_from_its_checkpoint(tiny_recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    run = Path(recipe.output_dir)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    preflight(dataclasses.replace(recipe, max_steps=None, num_train_epochs=2.0))
    report = lines_of(capsys.readouterr().out)
    assert report["length"].endswith("; resumes after step 4")
    assert "training tokens in" in report["data"]
    assert "cost" not in report
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_end_before_the_checkpoint_is_an_error_as_in_training(tiny_recipe: Make) -> None:
    train(tiny_recipe(max_steps=8))
    with pytest.raises(InputError, match="is at step 8, after the end of the run at step 4; raise max_steps"):
        preflight(tiny_recipe(max_steps=4))


def test_length_in_epochs_of_a_missing_corpus_is_unknown(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preflight(tiny_recipe(data_dir=str(tmp_path / "absent"), max_steps=None, num_train_epochs=1.0))
    report = lines_of(capsys.readouterr().out)
    assert report["length"].startswith("unknown: the corpus must be tokenized")
    assert "tokens/s" in report["speed"]
    assert "time" not in report


def test_all_reduce_of_two_processes_is_checked(tiny_recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    tiny_recipe(per_device_train_batch_size="auto", data_dir=str(tmp_path / "absent")).save(path)
    flags = ["--config", str(path), "--preflight", "--price_per_gpu_hour", "1.79"]
    done = launched("cpu_2_processes", str(TRAIN), *flags)
    assert done.returncode == 0, done.stderr
    report = lines_of(done.stdout)
    assert report["processes"].startswith("2 on 1 node: 2 × ")
    assert re.match(r"16 MiB summed correctly, [\d.e+]+ GB/s per process", report["all-reduce"])
    assert report["batch"] == "256 tokens a step = 4 × 32 × 2 processes × 1 accumulated"
    assert report["cost"].endswith("at 1.79 per GPU hour on 2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.yaml"]


def test_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pair: Any = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    with pytest.raises(InputError, match="rank 1: an all-reduce over 2 processes gave 2 instead of 3; fix"):
        module._check_all_reduce(pair)


def test_model_that_does_not_fit_is_a_one_line_error(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*arguments: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "train_step", out_of_memory)
    with pytest.raises(InputError, match=r"4 sequences of 32 tokens do not fit .* lower per_device_train_batch_size"):
        preflight(tiny_recipe())


def test_hours_count_the_remaining_steps_and_their_validations(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=100, eval_steps=25, eval_tokens=7_680)
    batch = plan_batch(tokens_per_step=256, seq_len=32, per_device=4, num_processes=1)
    lines: list[str] = []
    for steps, done in ((110, 90), (100, 40)):
        module.report_time(lines.append, recipe, batch, steps, done, seconds=3600.0, price=None)
    # 60 steps, and 3 validations (50, 75, 100) of a third of 30 steps each; and of 90 to 110, two (100, 110).
    assert [line.split()[1] for line in lines] == [f"{20 + 20}.0", f"{60 + 30}.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "nowhere", "data_dir": "absent"}, "unknown corpus 'nowhere'"),
        ({"tokenizer": "train:999"}, "tokenizer bpe-300 instead of train:999"),
        ({"tokenizer": "absent/folder/x", "data_dir": "absent"}, "tokenizer"),
        ({"seq_len": 4096, "tokens_per_step": 16384}, "validation shard .* holds 2,000 tokens"),
        ({"eval_tasks": ["lambada"], "eval_data_dir": "absent"}, "eval_tasks: no file lambada_test.jsonl"),
    ],
)
def test_preflight_refuses_what_training_refuses(change: dict[str, Any], message: str, tiny_recipe: Make) -> None:
    for start in (train, preflight):
        with pytest.raises(InputError, match=message):
            start(tiny_recipe(**change))
