"""What a run shows while it trains."""

from collections.abc import Callable
from pathlib import Path

import pytest

from training.loop import train
from training.monitoring.monitor import CurvePlotter
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_the_curves_are_plotted_after_every_validation(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plotted: list[int] = []
    monkeypatch.setattr(
        CurvePlotter,
        "start",
        lambda self, output_dir: plotted.append([line["step"] for line in read_metrics(output_dir)][-1]),
    )
    recipe = tiny_recipe(eval_steps=4, save_steps=0)
    train(recipe)
    assert plotted == [4, 8]  # the run itself plots the last picture
    run = Path(recipe.output_dir)
    assert (run / "curves.png").read_bytes() == (run / "model" / "curves.png").read_bytes()


def test_mfu_counts_the_attention_of_short_sequences(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.monitoring.monitor.peak_flops", lambda *_: 1.0)  # so that the log does not round MFU
    recipe = tiny_recipe(seq_len_warmup_steps=8, logging_steps=4, eval_steps=0, save_steps=0)
    train(recipe)
    lines = [line for line in read_metrics(Path(recipe.output_dir)) if "mfu" in line]
    per_token = [line["mfu"] / line["tokens_per_second"] for line in lines]
    attention = 12 * recipe.n_layer * recipe.n_embd * recipe.seq_len
    # Steps 4, 8 and 12: quarters, halves, whole windows. The log rounds tokens/s to a tenth.
    assert per_token[1] - per_token[0] == pytest.approx(attention / 4, rel=0.01)
    assert per_token[2] - per_token[1] == pytest.approx(attention / 2, rel=0.01)


@pytest.mark.usefixtures("drawn_curves")
def test_curves_are_plotted_in_the_background_and_a_late_plot_is_stopped(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(max_steps=2)
    train(recipe)
    picture = Path(recipe.output_dir) / "curves.png"
    before = picture.read_bytes()
    plotter = CurvePlotter()
    picture.unlink()
    plotter.start(Path(recipe.output_dir))
    process = plotter._process
    assert process is not None
    plotter.start(Path(recipe.output_dir))
    assert plotter._process is process  # still running
    assert process.wait(120) == 0
    assert picture.read_bytes() == before
    plotter.start(Path(recipe.output_dir))
    late = plotter._process
    assert late is not None
    assert late is not process
    plotter.stop()
    assert late.poll() is not None
    plotter.stop()  # nothing to do
