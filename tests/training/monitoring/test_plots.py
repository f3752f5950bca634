"""The pictures of the curves, and the command that draws them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

from common.cli_errors import InputError
from training.monitoring.plots import Curves, loss_limits, plot_curves, smoothed
from training.plots import main

NAN = float("nan")


def lines() -> list[dict[str, Any]]:
    training = [
        {"step": step, "tokens": 100 * step, "train_loss": 5.0 / step, "learning_rate": 1e-3, "grad_norm": 1.0 / step}
        for step in range(1, 20)
    ]
    return [*training, {"step": 10, "tokens": 1000, "val_loss": 3.5}]


def run_folder(path: Path, metrics: list[dict[str, Any]], **recipe: Any) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (path / "recipe.yaml").write_text(yaml.safe_dump({"corpus": "x", "tokenizer": "gpt2", **recipe}))
    return path


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words in the pictures that are drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    found: list[str] = []
    print_png = FigureCanvasAgg.print_png

    def note(canvas: FigureCanvasAgg, *args: Any, **kwargs: Any) -> None:
        print_png(canvas, *args, **kwargs)
        found.extend(text.get_text() for text in canvas.figure.findobj(Text))

    monkeypatch.setattr(FigureCanvasAgg, "print_png", note)
    return found


def test_plot_is_a_png_with_units_on_its_axes(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves(path, [Curves("a run", lines())])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {"a run", "tokens", "loss (nats per token)", "training", "validation (3.500)"} <= set(words)
    assert {"learning rate", "gradient norm"} <= set(words)
    assert "HellaSwag accuracy" not in words  # nothing measured it
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("corpus", "gpt2_tokens", "comparable"),
    [("fineweb-edu", True, True), ("fineweb-edu", False, False), ("fineweb", True, False), ("x", True, False)],
)
def test_gpt2_loss_is_drawn_only_where_losses_are_comparable(
    corpus: str, gpt2_tokens: bool, comparable: bool, words: list[str], tmp_path: Path
) -> None:
    plot_curves(tmp_path / "c.png", [Curves("a run", lines(), corpus, gpt2_tokens)])
    assert ("OpenAI GPT-2 124M: 3.292" in words) == comparable


@pytest.mark.parametrize(
    ("accuracy", "ahead"), [(0.26, ["124M: 0.2955"]), (0.31, ["124M: 0.2955", "355M: 0.3752"]), (NAN, ["124M: 0.2955"])]
)
def test_hellaswag_is_drawn_with_gpt2s_sizes_up_to_the_next(
    accuracy: float, ahead: list[str], words: list[str], tmp_path: Path
) -> None:
    hellaswag = {"step": 9, "tokens": 900, "hellaswag_acc_norm": accuracy}
    plot_curves(tmp_path / "c.png", [Curves("a run", [*lines(), hellaswag])])
    assert "HellaSwag accuracy" in words
    assert [word for word in words if word.startswith("OpenAI")] == [f"OpenAI GPT-2 {size}" for size in ahead]


def test_losses_that_are_not_finite_are_marked(words: list[str], tmp_path: Path) -> None:
    metrics = lines()
    metrics[3]["train_loss"] = NAN
    metrics[4]["train_loss"] = float("inf")
    metrics[5]["grad_norm"] = NAN
    plot_curves(tmp_path / "c.png", [Curves("a run", metrics)])
    assert "loss not finite (2 logged steps)" in words


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        lines()[:1],
        lines()[-1:],
        [{**line, "train_loss": NAN, "val_loss": NAN, "grad_norm": NAN} for line in lines() * 3],
        [{"step": 1, "tokens": 0, "train_loss": 1.0, "grad_norm": 0.0, "learning_rate": 0.0}],
        [{"step": 3, "a": "line that we did not write"}],
    ],
    ids=["nothing", "one step", "one validation", "nothing finite", "zeros", "foreign"],
)
def test_any_recorded_metrics_can_be_plotted(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_curves(tmp_path / "c.png", [Curves("a run", metrics)])
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_smoothing_takes_neighbours_of_both_sides_and_fewer_at_the_beginning() -> None:
    assert smoothed([5.0, 4.0, 9.0, 2.0, 1.0], 1) == pytest.approx([5.0, 6.0, 5.0, 4.0, 1.5])
    assert smoothed([5.0, 3.0, NAN, 1.0], 1) == pytest.approx([5.0, 4.0, 2.0, 1.0])
    assert math.isnan(smoothed([1.0, NAN, 2.0], 0)[1])
    assert smoothed([], 3) == []


def test_only_the_first_losses_may_lie_above_the_picture() -> None:
    tokens = [float(step) for step in range(1, 101)]
    falling = [11.0, 10.0, *[3.0] * 97, 2.0]
    assert loss_limits([(tokens, falling)]) == pytest.approx((1.95, 3.05))
    assert loss_limits([(tokens, [*falling[:50], 9.0, *falling[51:]])]) == pytest.approx((1.65, 9.35))  # a spike
    assert loss_limits([(tokens[:5], falling[:5])]) is None
    assert loss_limits([]) is None
    # The longest run sets the limits; a shorter run in the same plot does not change them.
    assert loss_limits([(tokens, falling), ([1.0, 2.0], [11.0, 10.0])]) == pytest.approx((1.95, 3.05))


def test_several_runs_share_a_plot_under_the_names_of_their_folders(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = run_folder(tmp_path / "a", lines()), run_folder(tmp_path / "b", lines()[:-1])
    monkeypatch.setattr(sys, "argv", ["plots", str(a), str(b), "--output", str(tmp_path / "new" / "both.png")])
    main()
    assert {"a (3.500)", "b (training)"} <= set(words)
    assert (tmp_path / "new" / "both.png").is_file()
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'both.png'}\n"


def test_runs_with_the_same_name_are_labelled_by_path(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = run_folder(tmp_path / "1" / "run", lines()), run_folder(tmp_path / "2" / "run", lines())
    monkeypatch.setattr(sys, "argv", ["plots", str(a), str(b), "--output", str(tmp_path / "c.png")])
    main()
    assert {f"{a} (3.500)", f"{b} (3.500)"} <= set(words)


def test_gpt2_loss_is_omitted_where_corpora_differ(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = run_folder(tmp_path / "a", lines(), corpus="fineweb-edu")
    b = run_folder(tmp_path / "b", lines(), corpus="fineweb")
    for runs, compared in (([a, a], True), ([a, b], False)):
        words.clear()
        monkeypatch.setattr(sys, "argv", ["plots", *map(str, runs), "--output", str(tmp_path / "c.png")])
        main()
        assert any(word.startswith("OpenAI") for word in words) == compared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a run folder: it has no recipe.yaml"),
        (["run", "."], r"\. is not a run folder"),
        (["run", "--output", "x.pdf"], "x.pdf: expected a name that ends with .png"),
        (["run", "--output", "run/recipe.yaml/x.png"], "cannot be written"),
        (["torn"], "torn/recipe.yaml is not a readable recipe"),
        ([], "required: RUN"),
    ],
)
def test_runs_that_cannot_be_plotted_are_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder(tmp_path / "run", lines())
    (run_folder(tmp_path / "torn", lines()) / "recipe.yaml").write_text("- a list\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots", *arguments])
    with pytest.raises(InputError, match=message) as caught:
        main()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "torn"]


def test_drawing_a_run_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", lines())
    code = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from training.plots import main
sys.argv = ["plots", {str(run)!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (run / "curves.png").is_file()
