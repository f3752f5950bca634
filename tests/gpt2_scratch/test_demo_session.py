"""What the demo page answers, without gradio and a browser."""

import re
from itertools import pairwise

import pytest
import torch
from support.model_folders import scratch  # noqa: F401 - a fixture

from gpt2_scratch import demo_views as views
from gpt2_scratch.demo_session import Demo, Text, check_settings
from gpt2_scratch.generate import load
from gpt2_scratch.inspection import Predictions, logit_lens

SETTINGS = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module")
def demo(scratch):
    return Demo(*load(str(scratch), "cpu"))


def completed(demo, prompt="one two", **changes):
    *_, text = demo.complete(prompt, **SETTINGS | changes)
    return demo.predict(text)


def visible(html):
    """The text of a view, as a reader sees it."""
    text = re.sub(r"<[^>]+>", "", html)
    return text.replace("&#123;", "{").replace("&#36;", "$").replace("&lt;", "<").replace("&gt;", ">")


def percentages(html):
    return [float(value) / 100 for value in re.findall(r"([\d.e-]+)%<", html)]


def test_a_completion_grows_by_one_token_at_a_time(demo):
    texts = list(demo.complete("one two", **SETTINGS))
    assert [len(text.ids) for text in texts] == list(range(7, 14))
    assert all(later.ids[: len(text.ids)] == text.ids for text, later in pairwise(texts))
    assert visible(demo.show_text(texts[0])) == "one two"
    assert 'class="g-token g-new"' in demo.show_text(texts[1])


def test_the_first_new_token_is_selected_or_else_the_last_one(demo):
    assert completed(demo).selected == 7
    assert completed(demo, max_new_tokens=0).selected == 6
    assert completed(demo, prompt="", max_new_tokens=0).selected == 0


def test_alternatives_are_the_models_probabilities(demo):
    text = completed(demo)
    with torch.no_grad():
        probabilities = demo.model(torch.tensor([text.ids])).logits[0].softmax(-1)
    own = demo.show_alternatives(text).split("</div><div>")[0]
    expected = probabilities[text.selected - 1]
    assert f"<b>{100 * float(expected[text.ids[text.selected]]):.2f}%</b>" in own
    assert percentages(own)[1:] == pytest.approx(expected.topk(10).values.tolist(), abs=6e-5)
    after = demo.show_alternatives(text).split("</div><div>")[1]
    assert percentages(after) == pytest.approx(probabilities[-1].topk(10).values.tolist(), abs=6e-5)


def test_the_summary_is_the_loss_of_the_text(demo):
    text = completed(demo, max_new_tokens=20)
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        loss = float(demo.model(ids, labels=ids).loss)
    assert f"{loss / 0.6931472:.2f} bits per token" in demo.show_text(text)
    assert "27 tokens" in demo.show_text(text)


def test_attention_of_the_selected_token_is_the_models(demo):
    text = completed(demo)._replace(selected=5)
    html = demo.show_attention(text, 2, 3)
    with torch.no_grad():
        attentions = demo.model(torch.tensor([text.ids]), output_attentions=True).attentions
    row = attentions[1][0, 2, 5, :6]
    table = html[html.index("<table") : html.index("</table")]
    assert percentages(table) == pytest.approx(row.sort(descending=True).values.tolist(), abs=6e-5)
    assert html.count("data-head") == 3
    assert html.count("data:image/png") == 4


def test_the_logit_lens_ends_with_the_models_prediction(demo):
    text = completed(demo)
    html = demo.show_lens(text)
    probability = float(text.predicted.probabilities[text.selected - 1])
    first_row = html[html.index("layer 2") :]
    assert percentages(first_row)[0] == pytest.approx(probability, abs=6e-5)
    assert html.index("layer 2") < html.index("layer 1") < html.index("embedding")


def test_the_actual_token_is_marked_and_not_another_of_the_same_text_or_rank():
    predicted = Predictions(
        probabilities=torch.tensor([0.4]),
        ranks=torch.tensor([1]),
        top_ids=torch.tensor([[5, 7, 9], [1, 2, 3]]),
        top_probabilities=torch.tensor([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2]]),
    )
    ids, texts = (4, 7), ["a", "b"]
    for html, marked in (
        (views.alternatives_view(ids, texts, ["b", "b", "c"], predicted, 1), [False, True, False]),
        (views.alternatives_view(ids, texts, ["x", "y", "z"], predicted, 2), [False, False, False]),
    ):
        assert ["g-actual" in row for row in re.findall(r"<tr.*?</tr>", html)] == marked


def test_the_lens_outlines_the_token_that_follows_by_its_id(demo, monkeypatch):
    text = completed(demo)
    monkeypatch.setattr(demo, "texts", lambda ids: ["same"] * len(ids))
    grid = demo.show_lens(text).split("g-lens")[1].split("<tbody>")[1]
    computed = demo._layers(text)
    likeliest = logit_lens(demo.model, computed, slice(0, text.selected)).argmax(-1)
    following = torch.tensor(text.ids[1 : text.selected + 1])
    assert grid.count("g-actual") == int((likeliest == following).sum())


def test_a_selected_token_costs_one_forward_pass(demo):
    text, passes = completed(demo), []
    expected = demo.show_alternatives(text), demo.show_attention(text, 2, 3), demo.show_lens(text)
    hook = demo.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        assert demo.show_selected(text, 2, 3) == expected
    finally:
        hook.remove()
    assert len(passes) == 1


def test_every_token_can_be_looked_at_even_in_a_full_text(demo):
    text = completed(demo, prompt="a" * 20, max_new_tokens=31)
    assert len(text.ids) == 32
    for index in range(len(text.ids)):
        selected = text._replace(selected=index)
        assert "g-bars" in demo.show_alternatives(selected)
        assert "g-lens" in demo.show_lens(selected)
        assert "g-matrix" in demo.show_attention(selected, 1, 1)


def test_an_empty_prompt_starts_a_document(demo):
    text = completed(demo, prompt="")
    assert text.ids[0] == demo.tokenizer.eos_token_id
    assert visible(demo.show_text(text)).startswith("<|endoftext|>")


@pytest.mark.parametrize("prompt", ["<script>alert(1)</script>", "${1+1} {{value}}", "</span>&amp;"])
def test_text_of_the_user_is_escaped(demo, prompt):
    text = completed(demo, prompt=prompt[:25], max_new_tokens=0)
    for html in (demo.show_text(text), demo.show_alternatives(text), demo.show_attention(text, 1, 1)):
        assert "<script" not in html
        assert "{" not in html.replace("&#123;", "")
        assert "$" not in html.replace("&#36;", "")


def test_parts_of_a_character_are_shown_as_bytes(demo):
    ids = demo.tokenizer("é日")["input_ids"]
    assert views.token_texts(demo.tokenizer, ids) == ["‹C3›", "‹A9›", "‹E6›", "‹97›", "‹A5›"]


def test_control_characters_are_visible(demo):
    ids = demo.tokenizer("a\x00\r\t\n\x7f")["input_ids"]
    assert views.token_texts(demo.tokenizer, ids) == ["a", "‹00›", "‹0D›", "\t", "\n", "‹7F›"]


def test_line_breaks_are_marked_in_the_text_and_on_one_line_elsewhere():
    html = views.text_view(["a", "\n", " b"], 1)
    assert '<span class="g-break"></span>\n' in html
    assert visible(html) == "a\n b"
    assert "↵" in views._chip("\n")


def test_a_token_is_tinted_by_its_surprisal():
    assert views._tint(1.0) == 0
    assert views._tint(2**-6) == pytest.approx(50)
    assert views._tint(0.0) == 100


def test_pictures_of_long_texts_are_small():
    weights = torch.eye(1024)
    assert len(views._picture(weights, 64)) < 5_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": None}, "Seed must be from 0 to 9,223,372,036,854,775,807; found nothing"),
        ({"seed": -1}, "Seed must be from 0 to 9,223,372,036,854,775,807; found -1"),
        ({"temperature": float("nan")}, "Temperature must be 0 or more; found nan"),
        ({"temperature": float("inf")}, "Temperature must be 0 or more; found inf"),
        ({"temperature": 1e-9}, "Temperature 0 \\(greedy decoding\\) or at least"),
        ({"top_p": 0}, "Top-p must be above 0"),
        ({"top_p": 1.5}, "Top-p must be from 0 to 1; found 1.5"),
        ({"top_k": -3}, "Top-k must be 0 or more; found -3"),
        ({"max_new_tokens": -1}, "New tokens must be 0 or more; found -1"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changes, message):
    check_settings(**SETTINGS)
    with pytest.raises(ValueError, match=message):
        check_settings(**SETTINGS | changes)


def test_a_prompt_that_fills_the_model_is_refused(demo):
    with pytest.raises(
        ValueError, match="a prompt of 40 tokens leaves no room in the model's 32 positions; shorten it"
    ):
        next(demo.complete("a" * 40, **SETTINGS))


def test_two_pages_do_not_share_a_text(demo):
    first, second = demo.complete("aaaa", **SETTINGS), demo.complete("bb", **SETTINGS | {"seed": 9})
    pairs = list(zip(first, second, strict=False))
    assert pairs[-1][0] == completed(demo, "aaaa")._replace(predicted=None, selected=0)
    assert pairs[-1][1] == completed(demo, "bb", seed=9)._replace(predicted=None, selected=0)
    assert Text() == ((), 0, 0, None)
