"""The picture of the curves."""

from pathlib import Path
from typing import Any

import pytest

from training.plots import plot_curves, smoothed


def lines() -> list[dict[str, Any]]:
    training = [{"tokens": 100 * step, "train_loss": 5.0 / step} for step in range(1, 20)]
    return [*training, {"tokens": 1000, "val_loss": 3.5}]


def drawn_texts(monkeypatch: pytest.MonkeyPatch, path: Path, metrics: list[dict[str, Any]], **about: Any) -> list[str]:
    """Draw, and return the words in the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    words: list[str] = []
    print_png = FigureCanvasAgg.print_png

    def note(canvas: FigureCanvasAgg, *args: Any, **kwargs: Any) -> None:
        print_png(canvas, *args, **kwargs)
        words.extend(text.get_text() for text in canvas.figure.findobj(Text))

    monkeypatch.setattr(FigureCanvasAgg, "print_png", note)
    plot_curves(path, metrics, title="a run", **about)
    return words


def test_the_picture_is_a_png_with_axes_that_say_their_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    words = drawn_texts(monkeypatch, path, lines(), corpus="installed-docs", gpt2_tokens=False)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {"a run", "tokens", "loss (nats per token)", "training", "validation (3.500)"} <= set(words)
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(
    ("corpus", "gpt2_tokens", "comparable"),
    [("fineweb-edu", True, True), ("fineweb-edu", False, False), ("fineweb", True, False), ("x", True, False)],
)
def test_gpt2s_line_stands_only_where_losses_compare(
    corpus: str, gpt2_tokens: bool, comparable: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = drawn_texts(monkeypatch, tmp_path / "c.png", lines(), corpus=corpus, gpt2_tokens=gpt2_tokens)
    assert ("OpenAI GPT-2 124M: 3.292" in words) == comparable


def test_a_run_without_a_line_still_gets_a_picture(tmp_path: Path) -> None:
    plot_curves(tmp_path / "c.png", [], title="t", corpus="x", gpt2_tokens=False)
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_smoothing_starts_at_the_first_value_and_keeps_constants() -> None:
    assert smoothed([4.0, 4.0, 4.0], weight=0.9) == pytest.approx([4.0] * 3)
    assert smoothed([1.0, 3.0], weight=0.5) == pytest.approx([1.0, (0.5 * 0.5 * 1.0 + 0.5 * 3.0) / 0.75])
