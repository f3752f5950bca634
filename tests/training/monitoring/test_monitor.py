"""What is seen of a run while it goes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from training.loop import train
from training.monitoring.monitor import Watch, _DrawingBeside
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_the_curves_are_drawn_anew_at_every_validation(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        _DrawingBeside,
        "start",
        lambda drawing, output_dir: drawn.append([line["step"] for line in read_metrics(output_dir)][-1]),
    )
    recipe = tiny_recipe(eval_steps=4, save_steps=0)
    train(recipe)
    assert drawn == [4, 8]  # at the end, the last picture is drawn by the run itself
    run = Path(recipe.output_dir)
    assert (run / "curves.png").read_bytes() == (run / "model" / "curves.png").read_bytes()


def test_a_picture_is_drawn_beside_the_run_and_one_that_is_late_is_given_up(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    picture = Path(recipe.output_dir) / "curves.png"
    before = picture.read_bytes()
    drawing = _DrawingBeside()
    picture.unlink()
    drawing.start(Path(recipe.output_dir))
    process = drawing._process
    assert process is not None
    drawing.start(Path(recipe.output_dir))
    assert drawing._process is process  # still at it
    assert process.wait(120) == 0
    assert picture.read_bytes() == before
    drawing.start(Path(recipe.output_dir))
    late = drawing._process
    assert late is not None
    assert late is not process
    drawing.stop()
    assert late.poll() is not None
    drawing.stop()  # nothing to do


def test_results_of_tasks_reach_the_metrics(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = Watch.validate

    def with_tasks(watch: Watch, done: int) -> None:
        validate(watch, done)
        watch.record_tasks(done, {"hellaswag_acc_norm": 0.25})

    monkeypatch.setattr(Watch, "validate", with_tasks)
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    lines = [line for line in read_metrics(Path(recipe.output_dir)) if "hellaswag_acc_norm" in line]
    assert lines == [{"step": 2, "tokens": 512, "hellaswag_acc_norm": 0.25}]
    assert "2 hella 0.2500\n" in (Path(recipe.output_dir) / "log.txt").read_text()
