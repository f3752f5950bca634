"""Resuming after kills, user errors, and from older checkpoints."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT
from support.trained import everything_in, run_of

from common.cli_errors import InputError
from gpt2_scratch.source_folder import model_in_run
from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.train import parse_command

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_resuming_from_an_older_checkpoint_renames_the_later_ones(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(save_total_limit=None)  # checkpoints 4, 8, 12
    train(recipe)
    older = run_of(recipe) / "checkpoints" / "step-000004"
    again = dataclasses.replace(recipe, resume_from_checkpoint=str(older), save_total_limit=2, seed=recipe.seed)
    train(again)
    names = {path.name for path in (run_of(recipe) / "checkpoints").iterdir()}
    assert names == {"abandoned-step-000008", "abandoned-step-000012", "step-000008", "step-000012"}
    steps = [line["step"] for line in read_metrics(run_of(recipe)) if "train_loss" in line]
    assert steps == list(range(1, 13))
    # Checkpoints renamed earlier are kept, and their new paths are logged.
    train(dataclasses.replace(again, resume_from_checkpoint=str(run_of(recipe) / "checkpoints" / "step-000008")))
    names = {path.name for path in (run_of(recipe) / "checkpoints").iterdir()}
    assert names >= {"abandoned-step-000008", "abandoned-step-000012", "abandoned-2-step-000012"}
    assert "abandoned-2-step-000012; delete them if you like" in (run_of(recipe) / "train.log").read_text()


def learning_rates(run: Path) -> dict[int, float]:
    return {line["step"]: line["learning_rate"] for line in read_metrics(run) if "learning_rate" in line}


def test_decay_branches_from_any_checkpoint_of_a_stable_run(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = tiny_recipe(
        output_dir=str(tmp_path / "a"),
        lr_scheduler_type="warmup_stable_decay",
        learning_rate=1.0,
        min_learning_rate_ratio=0.1,
        max_skipped_steps=99,
        decay_steps=2,
        max_steps=10,
        save_total_limit=None,
    )
    train(trunk)
    before = everything_in(tmp_path / "a")
    start = tmp_path / "a" / "checkpoints" / "step-000004"
    arguments = ["--config", str(tmp_path / "a" / "recipe.yaml"), "--resume_from_checkpoint", str(start)]
    arguments += ["--output_dir", str(tmp_path / "a-decayed"), "--max_steps", "8", "--decay_steps", "4"]
    branch = parse_command(arguments).recipe
    train(branch)
    assert everything_in(tmp_path / "a") == before
    # The decay's table is in test_schedule; lines are named after the steps that are done.
    expected = {5: 1.0, 6: 0.55, 7: 0.3636039, 8: 0.2205771}
    assert learning_rates(tmp_path / "a-decayed") == pytest.approx(expected, abs=1e-7)
    assert [rate for step, rate in learning_rates(tmp_path / "a").items() if step > 2] == pytest.approx(
        [1.0] * 7 + [0.3636039], abs=1e-7
    )
    # The same command resumes the branch, which is complete here.
    capsys.readouterr()
    train(branch)
    assert "is complete: 8 of 8 steps" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "a-decayed" / "model")
    shutil.rmtree(tmp_path / "a-decayed" / "checkpoints" / "step-000008")
    train(dataclasses.replace(branch, save_steps=1, max_steps=6))
    train(dataclasses.replace(branch, save_steps=1, max_steps=7))
    assert "resumed from " + str(tmp_path / "a-decayed" / "checkpoints" / "step-000006") in capsys.readouterr().out


def test_extended_run_uses_the_learning_rates_of_the_longer_run(
    tiny_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(max_steps=4, lr_scheduler_type="linear", warmup_steps=0, learning_rate=1e-3)
    train(recipe)
    assert "changed since" not in capsys.readouterr().out
    train(dataclasses.replace(recipe, max_steps=8, adam_beta2=0.99))
    assert "changed since the last start: max_steps: 4 → 8, adam_beta2: 0.95 → 0.99\n" in capsys.readouterr().out
    # Down to a tenth over 4 steps, then what 8 steps have from their middle on: it jumps up.
    expected = {1: 10.0, 2: 7.75, 3: 5.5, 4: 3.25, 5: 5.5, 6: 4.375, 7: 3.25, 8: 2.125}
    found = {step: 1e4 * rate for step, rate in learning_rates(run_of(recipe)).items()}
    assert found == pytest.approx(expected)


def test_model_folder_is_written_again_after_an_extension(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    shutil.copytree(run_of(recipe) / "model", run_of(recipe).parent / "old")
    longer = dataclasses.replace(recipe, max_steps=8)
    train(longer)
    # As if the run had been killed between its last checkpoint and its model.
    shutil.rmtree(run_of(recipe) / "model")
    shutil.copytree(run_of(recipe).parent / "old", run_of(recipe) / "model")
    train(longer)
    newest = checkpoints(run_of(recipe))[-1] / "model.safetensors"
    assert (run_of(recipe) / "model" / "model.safetensors").read_bytes() == newest.read_bytes()


def test_run_shortened_to_its_checkpoint_is_validated_there(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(eval_steps=6, save_steps=8, save_total_limit=None)
    train(recipe)
    shutil.rmtree(run_of(recipe) / "model")
    shutil.rmtree(run_of(recipe) / "checkpoints" / "step-000012")
    train(dataclasses.replace(recipe, max_steps=8))
    # The validation of step 6 is not the end's.
    assert [line["step"] for line in read_metrics(run_of(recipe)) if "val_loss" in line] == [6, 8]


DAMAGED = {
    "torn": b'{"step": 3, "tokens"',
    "edited": b'{"step": "3"}\n{"step": 2, "tokens": 512, "train_loss": "low"}\n[1]\nnull\n',
    "latin-1": "Größe: 1\n".encode("latin-1"),
    "deep": b"[" * 100_000,
    "digits": b'{"step": '
    + b"9" * 5000
    + b', "train_loss": 1}\n{"step": 2, "tokens": 1, "train_loss": 1'
    + b"0" * 400
    + b"}",
    "keys": b'{"format_version": 1, "tasks": {"x": {"figures": 1}}, "step": "two"}',
    "empty": b"",
    "nul": b"\0" * 100,
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_side_files_keep_no_run_from_resuming(
    damage: str, tiny_recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(max_steps=3, eval_steps=0, sample_steps=0, save_steps=0)
    train(recipe)
    names = (
        ".starts.jsonl",
        "metrics.jsonl",
        ".pushed.json",
        "eval_results.json",
        "recipe.yaml",
        "samples.txt",
        "log.txt",
    )
    for name in names:
        (run_of(recipe) / name).write_bytes(DAMAGED[damage])
    train(dataclasses.replace(recipe, max_steps=4))
    assert [line["step"] for line in read_metrics(run_of(recipe)) if "train_loss" in line][-1] == 4
    printed = capsys.readouterr().out
    assert ("metrics.jsonl: dropped" in printed) == (damage != "empty")
    if damage == "edited":
        assert (run_of(recipe) / "metrics.jsonl.unreadable").read_bytes() == DAMAGED[damage]
    kept = run_of(recipe) / "recipe.yaml.unreadable"
    assert not kept.exists() or kept.read_bytes() == DAMAGED[damage]


def test_folders_of_other_names_and_empty_ones_are_no_checkpoints(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    (run_of(recipe) / "checkpoints" / "step-000999").mkdir()
    for name in ("step-best", "step-00000000002", "step-٠٠٠٠٠٩"):  # as people call copies; no name of ours
        shutil.copytree(checkpoints(run_of(recipe))[-1], run_of(recipe) / "checkpoints" / name)
    (run_of(recipe) / "recipe.yaml.unfinished").write_text("torn")
    train(dataclasses.replace(recipe, max_steps=3))
    assert [path.name for path in checkpoints(run_of(recipe))] == ["step-000002", "step-000003"]
    assert model_in_run(str(run_of(recipe))) == str(run_of(recipe) / "model")
    assert not (run_of(recipe) / "recipe.yaml.unfinished").exists()


def test_a_run_without_its_recipe_resumes(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    (run_of(recipe) / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"another run \(n_layer: 2 → 3\)"):
        train(dataclasses.replace(recipe, n_layer=3))
    train(dataclasses.replace(recipe, max_steps=3))
    assert checkpoints(run_of(recipe))[-1].name == "step-000003"


def test_run_with_corrupted_log_lines_resumes(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=4)
    train(recipe)
    with (run_of(recipe) / "metrics.jsonl").open("a") as file:
        file.write("not json\n[1]\n")
    with (run_of(recipe) / "log.txt").open("a") as file:
        file.write("\nnot a step\n")
    train(dataclasses.replace(recipe, max_steps=6))
    assert [line["step"] for line in read_metrics(run_of(recipe)) if "train_loss" in line] == [1, 2, 3, 4, 5, 6]


def test_non_finite_loss_ends_the_run_before_a_save(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=8, save_steps=4)
    train(dataclasses.replace(recipe, max_steps=4))
    with pytest.raises(InputError, match=r"validation loss is not finite; lower .*step-000004, and"):
        train(dataclasses.replace(recipe, learning_rate=1e30))
    assert [path.name for path in checkpoints(run_of(recipe))] == ["step-000004"]


def test_prompt_longer_than_n_positions_is_truncated(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2, sample_prompts=["The model keeps its own place. " * 40])
    train(recipe)
    assert (run_of(recipe) / "model" / "README.md").is_file()


def test_reported_shape_is_that_of_the_loaded_model(
    tiny_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_recipe(max_steps=1))
    capsys.readouterr()
    other = tiny_recipe(output_dir=str(tmp_path / "other"), init_from=str(tmp_path / "run" / "model"), max_steps=1)
    train(other)
    assert "2 layers, width 32" in capsys.readouterr().out
    assert "2 layers, 2 heads" in (run_of(other) / "model" / "README.md").read_text()


@pytest.mark.slow
def test_printed_commands_work(
    programs: Path, tiny_recipe: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(programs.parent))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    recipe = tiny_recipe(max_steps=2, sample_prompts=['I\'m "$HOME"'])
    train(recipe)
    lines = capsys.readouterr().out.split("To try next:\n")[1].strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, (line, done.stderr)
    assert "is complete: 4 steps" in done.stdout.replace("The run is complete", "is complete")
    assert json.loads((run_of(recipe) / "checkpoints/step-000004/training_state/trainer_state.json").read_text())


def test_files_of_a_model_folder_can_be_read_by_others(tiny_recipe: Make) -> None:
    train(tiny_recipe(max_steps=1))
    model = run_of(tiny_recipe()) / "model"
    assert (model / "model.safetensors").stat().st_mode == (model / "config.json").stat().st_mode
