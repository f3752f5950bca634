"""Trackers: what they receive, resumed runs, and missing packages."""

import dataclasses
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT

from common.cli_errors import InputError
from training.checkpoints.checkpoint_folder import checkpoints
from training.loop import train
from training.monitoring import trackers
from training.monitoring.trackers import chosen_trackers
from training.recipe import Recipe, load_recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def launched(recipe: Recipe, path: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Train in a separate process: trackers read the environment when they are imported."""
    recipe.save(path)
    return subprocess.run(
        [sys.executable, ROOT / "training" / "train.py", "--config", path],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


def forget_steps_after(recipe: Recipe, step: int) -> None:
    """Make a run look as if it had been killed before it saved later checkpoints."""
    for checkpoint in checkpoints(Path(recipe.output_dir)):
        if int(checkpoint.name.removeprefix("step-")) > step:
            checkpoint.rename(Path(recipe.output_dir).parent / checkpoint.name)


def test_tensorboard_has_each_step_of_a_resumed_run_once_and_samples_as_text(tiny_recipe: Make) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny_recipe(report_to=["tensorboard"], save_total_limit=None)
    train(recipe)
    forget_steps_after(recipe, 4)
    train(recipe)
    events = EventAccumulator(str(Path(recipe.output_dir) / trackers.PROJECT))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, 13))
    assert [event.step for event in events.Scalars("val_loss")] == [6, 12]
    assert {"learning_rate", "grad_norm", "tokens_per_second", "smoothed_loss"} <= set(events.Tags()["scalars"])
    text = next(tag for tag in events.Tags()["tensors"] if tag.startswith("samples"))
    assert {event.step for event in events.Tensors(text)} == {6, 12}  # only scalars after the checkpoint are dropped
    assert b"The model" in events.Tensors(text)[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_weights_and_biases_works_offline(tiny_recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra: pip install -c constraints.txt -e '.[wandb]'")
    recipe = tiny_recipe(report_to=["wandb"], max_steps=3)
    for steps in (3, 5):
        longer = dataclasses.replace(recipe, max_steps=steps)
        done = launched(longer, tmp_path / "r.yaml", WANDB_MODE="offline", WANDB_SILENT="true")
        assert done.returncode == 0, done.stderr
    name = (Path(recipe.output_dir) / "tracker_run.txt").read_text().strip()
    assert name.startswith("run-")
    written = sorted((Path(recipe.output_dir) / "wandb").glob(f"offline-run-*-{name}/*.wandb"))
    assert len(written) == 2  # both starts, of one run
    for key in (b"train_loss", b"val_loss", b"samples"):
        assert key in written[-1].read_bytes()


@pytest.mark.slow
def test_weights_and_biases_without_a_key_is_one_line(tiny_recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra: pip install -c constraints.txt -e '.[wandb]'")
    recipe = tiny_recipe(report_to=["wandb"], max_steps=1)
    done = launched(recipe, tmp_path / "r.yaml", HOME=str(tmp_path), NETRC=str(tmp_path / "none"), WANDB_MODE="online")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "Weights & Biases cannot be started: " in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_trackio_continues_the_run_of_an_earlier_start(tiny_recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is an extra: pip install -c constraints.txt -e '.[trackio]'")
    recipe = tiny_recipe(report_to=["trackio"], max_steps=3)
    for steps in (3, 5):
        done = launched(
            dataclasses.replace(recipe, max_steps=steps), tmp_path / "r.yaml", TRACKIO_DIR=str(tmp_path / "trackio")
        )
        assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").glob(f"{trackers.PROJECT}*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, _, _ in rows} == {(Path(recipe.output_dir) / "tracker_run.txt").read_text().strip()}
    assert [step for _, step, metrics in rows if b"train_loss" in metrics] == [1, 2, 3, 4, 5]
    assert any(b"samples" in metrics for _, _, metrics in rows)


def test_an_error_names_the_missing_tracker_and_the_command_that_installs_it(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trackers, "_AVAILABLE", {"tensorboard": lambda: True, "wandb": lambda: False, "trackio": lambda: False}
    )
    recipe = tiny_recipe(report_to=["trackio", "wandb", "tensorboard"])
    with pytest.raises(
        InputError, match=r"names wandb and trackio, which cannot be imported.*-e '\.\[wandb,trackio\]'"
    ) as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    assert not Path(recipe.output_dir).exists()
    assert chosen_trackers(tiny_recipe(report_to=["all"])) == ["tensorboard"]
    assert chosen_trackers(tiny_recipe(report_to=["none"])) == []


@pytest.mark.parametrize(
    ("written", "read"),
    [("wandb", ["wandb"]), ("[tensorboard, wandb]", ["tensorboard", "wandb"]), ("none", ["none"]), ("all", ["all"])],
)
def test_one_tracker_needs_no_brackets(written: str, read: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text((ROOT / "training/recipes/quickstart.yaml").read_text() + f"\nreport_to: {written}\n")
    assert load_recipe(path).report_to == read


def test_an_unknown_tracker_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text((ROOT / "training/recipes/quickstart.yaml").read_text() + "\nreport_to: [tensorboard, mlflow]\n")
    with pytest.raises(InputError, match=r"report_to: expected one of none, all, tensorboard, .* found 'mlflow'"):
        load_recipe(path)
