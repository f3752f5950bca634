"""The forecast of a run on GPUs that are not there, held against figures worked out by hand."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchConfig
from training.recipe import RECIPES, load_recipe
from training.setup.forecast import forecast
from training.train import parse_command

OFFICIAL = load_recipe(RECIPES / "gpt2-124m-fineweb-edu.yaml")
XL: dict[str, Any] = {"n_layer": 48, "n_embd": 1600, "n_head": 25, "per_device_train_batch_size": "auto"}


def lines_of(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in capsys.readouterr().out.splitlines()}


def test_forecast_of_gpt2_124m_on_eight_a100(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(OFFICIAL, output_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "data"))
    forecast(recipe, "a100", gpus=8, price_per_gpu_hour=1.79)
    report = lines_of(capsys)
    assert report["gpus"] == "8 × A100, 80 GiB, 312 TFLOP/s in bf16"
    assert "124.4M parameters, 12 layers, width 768, vocabulary 50,257, in bf16" in report["model"]
    assert report["batch"] == "524,288 tokens a step = 64 × 1024 × 8 processes × 1 accumulated"
    # 0.4 · 8 · 312e12 / (6 · 124,439,808 + 12 · 12 · 768 · 1024)
    assert report["speed"] == "1,161,085 tokens/s: an assumption, MFU 40%"
    assert report["length"] == "19,073 steps, 9,999,745,024 tokens"
    # 77 validations, one third of the cost of training for a token each: (1e10 + 77 · 10,485,760 / 3) / 1,161,085 s
    assert report["time"].startswith("2.5 hours")
    assert report["cost"] == "35.18 at 1.79 per GPU hour on 8"
    assert list(tmp_path.iterdir()) == []
    forecast(recipe, "a100", gpus=8, mfu=0.8, price_per_gpu_hour=3.58)
    report = lines_of(capsys)
    assert report["cost"] == "35.18 at 3.58 per GPU hour on 8"
    assert report["time"].startswith("1.2 hours")


OFFICIAL_SIZES = [path for path in sorted(RECIPES.glob("gpt2-*.yaml")) if "laptop" not in path.stem]


@pytest.mark.parametrize("path", OFFICIAL_SIZES, ids=lambda path: path.stem)
def test_the_head_of_a_recipe_gives_its_time_and_cost_and_how_to_compute_them(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = " ".join(path.read_text().partition("output_dir:")[0].replace("#", "").split())
    stated = re.search(r"([\d.]+) (hours|minutes)(?: and|,) \$([\d,.]+)", head)
    flags = re.search(r"--preflight --gpu \S+ --gpus \d+ --mfu \S+ --price_per_gpu_hour \S+", head)
    assert stated is not None
    assert flags is not None
    command = parse_command(["--config", str(path), *flags[0].split()])
    forecast(command.recipe, **command.flags)
    report = lines_of(capsys)
    hours = float(stated[1]) / (60 if stated[2] == "minutes" else 1)
    assert float(report["time"].split()[0]) == pytest.approx(hours, rel=0.025)  # both are rounded
    alone = re.search(r"the same steps take ([\d.]+) (hours|days) on an [AH]100", head)
    assert alone is not None
    assert float(alone[1]) * (24 if alone[2] == "days" else 1) == pytest.approx(8 * hours, rel=0.025)
    cost, expected = (float(text.replace(",", "")) for text in (report["cost"].split()[0], stated[3]))
    assert cost == pytest.approx(expected, rel=0.01)


def test_gpus_without_bf16_train_in_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(OFFICIAL, per_device_train_batch_size="auto")
    forecast(recipe, "t4")
    assert lines_of(capsys)["gpus"] == "1 × T4, 16 GiB, 65 TFLOP/s in fp16"
    forecast(dataclasses.replace(recipe, mixed_precision="no"), "t4")
    assert lines_of(capsys)["gpus"] == "1 × T4, 16 GiB, 8.1 TFLOP/s in fp32"
    with pytest.raises(InputError, match="T4 has no bf16; set the recipe key mixed_precision: fp16"):
        forecast(dataclasses.replace(recipe, mixed_precision="bf16"), "t4")


def test_attention_that_this_machine_lacks_is_no_obstacle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.setup.model.has_triton", lambda: False)
    forecast(dataclasses.replace(OFFICIAL, attn_implementation="flex_attention"), "a100")
    assert "tokens/s" in lines_of(capsys)["speed"]


def test_a_model_that_does_not_fit_is_sharded_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    large = dataclasses.replace(OFFICIAL, **XL)
    forecast(large, "rtx4090", gpus=8)
    report = lines_of(capsys)
    assert ", with FSDP2: " in report["memory"]
    assert report["batch"].endswith("× 8 processes × 16 accumulated")
    # Weights, gradients and two moments of 1.56B parameters take 23.2 GiB.
    with pytest.raises(InputError, match=r"a single sequence of 1,024 tokens need.* 21.60 GiB of rtx4090; set activ"):
        forecast(large, "rtx4090")
    with pytest.raises(InputError, match=r"64 sequences of 1,024 tokens .*; set per_device_train_batch_size: auto"):
        forecast(OFFICIAL, "t4")


def test_unknown_length_is_said_and_costs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        OFFICIAL, data_dir=str(tmp_path), max_steps=None, max_tokens=None, num_train_epochs=1.0
    )
    forecast(recipe, "h100", gpus=8)
    report = lines_of(capsys)
    assert report["length"].startswith("unknown: the corpus must be tokenized")
    assert "cost" not in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gpu a100", "--gpu needs --preflight"),
        ("--preflight --gpus 8", "--gpus and --mfu need --gpu"),
        ("--preflight --gpu a100 --gpus 0", "--gpus must be at least 1, found 0"),
        ("--preflight --gpu a100 --mfu 40", "--mfu must be above 0 and at most 1, found 40.0"),
    ],
)
def test_flags_that_make_no_sense_are_errors(flags: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_command(flags.split())


@pytest.mark.parametrize(
    ("source", "sizes", "message"),
    [
        ("model", {"n_layer": 5}, "the recipe has n_layer=5, but init_from .* has 1; remove n_layer"),
        ("no-such-model", {}, "init_from .* is no folder; check the path"),
        ("empty", {}, "cannot build the model: init_from .* has no config.json"),
        ("broken", {}, "cannot build the model: "),
    ],
)
def test_model_to_start_from_is_checked_as_in_training(
    tmp_path: Path, source: str, sizes: dict[str, int], message: str
) -> None:
    GPT2ScratchConfig(n_positions=16, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    unset = {"n_layer": None, "n_head": None, "n_embd": None}
    recipe = dataclasses.replace(OFFICIAL, **{**unset, **sizes, "init_from": str(tmp_path / source)})
    with pytest.raises(InputError, match=message):
        forecast(recipe, "a100")


def test_more_positions_than_the_model_to_start_from_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    GPT2ScratchConfig(n_positions=16, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "model")
    unset = {"n_layer": None, "n_head": None, "n_embd": None}
    forecast(dataclasses.replace(OFFICIAL, **unset, init_from=str(tmp_path / "model")), "a100")
    parameters = 50_257 * 32 + 1024 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32
    assert f"{parameters / 1e6:.1f}M parameters, 1 layers" in lines_of(capsys)["model"]


def test_unknown_gpus_are_errors_that_name_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown GPU a1000; did you mean a100\?; known are a100, a100-40gb, h100"):
        forecast(OFFICIAL, "a1000")
    with pytest.raises(InputError, match="nearest multiples"):
        forecast(OFFICIAL, "a100", gpus=7)
