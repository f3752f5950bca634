"""The model card when it is written again: edits stay, and results are new."""

from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from support.cards import CONFIG, FACTS, card, hellaswag

from training.hub.card import write_model_card
from training.hub.card_edits import with_edits_of
from training.recipe import Recipe


def test_an_edited_card_keeps_its_text_and_gets_new_results(tmp_path: Path) -> None:
    recipe = Recipe(output_dir="runs/x", data_dir="data/x", corpus="fineweb-edu", max_steps=10)
    write_model_card(tmp_path, recipe, FACTS, CONFIG)
    path = tmp_path / "README.md"
    edited = path.read_text().replace("## Results", "## Results\n\nI like these.")
    edited = edited.replace(edited[edited.index("## Samples") : edited.index("## Training")], "")
    path.write_text(edited.replace("library_name:", "license: odc-by\nlibrary_name:"))
    write_model_card(tmp_path, recipe, replace(FACTS, val_loss=2.9, steps=19_074), CONFIG, earlier=tmp_path)
    again = path.read_text()
    assert "I like these." in again
    assert "license: odc-by" in again
    assert "| **2.9000** |" in again
    assert "3.0412" not in again
    assert "19,073 steps" in again
    assert "Samples" not in again
    assert again.count("# my-gpt2") == 1


def test_an_unedited_card_is_overwritten() -> None:
    first, _ = with_edits_of(None, card())
    later = card(replace(FACTS, val_loss=1.0, steps=20_000))
    assert with_edits_of(first, later) == with_edits_of(None, later)
    assert with_edits_of(first, first) == (first, False)


@pytest.mark.parametrize(
    ("old", "new", "text_stays"),
    [("# my-gpt2", "# my very own gpt2", True), ("license: mit", "license: odc-by", False)],
)
def test_an_edit_of_text_or_metadata_stays_over_several_pushes(old: str, new: str, text_stays: bool) -> None:
    pushed, _ = with_edits_of(None, card())
    assert old in pushed
    pushed = pushed.replace(old, new)
    for loss in (2.0, 1.0):
        pushed, stays = with_edits_of(pushed, card(replace(FACTS, val_loss=loss)))
        assert stays == text_stays
        assert new in pushed
        assert old not in pushed
        assert f"| **{loss:.4f}** |" in pushed


def test_results_of_others_in_the_metadata_stay() -> None:
    theirs = """---
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {type: org/other, name: Other}
    metrics: [{type: accuracy, value: 0.5, name: theirs}]
---
Their text.
"""
    text, text_stays = with_edits_of(theirs, card())
    assert text_stays
    assert "Their text." in text
    data = huggingface_hub.ModelCard(text).data
    assert {result.dataset_type for result in data.eval_results} == {"org/other", "HuggingFaceFW/fineweb-edu"}


def test_results_of_a_later_step_replace_the_earlier_ones_and_the_card_names_it() -> None:
    old, _ = with_edits_of(None, card(replace(FACTS, val_step=1_000, task_results=hellaswag(0.2, step=1_000))))
    later = card(replace(FACTS, val_step=19_000, task_results=hellaswag(0.3, step=19_073)))
    text, _ = with_edits_of(old.replace("# my-gpt2", "# edited").replace("license: mit", "license: odc-by"), later)
    results = {result.metric_type: result.metric_value for result in huggingface_hub.ModelCard(text).data.eval_results}
    assert results == {"loss": 3.0412, "bits_per_byte": 0.9, "acc_norm": 0.3}
    assert "The validation loss is of step 19,000. The tasks were evaluated after step 19,073." in text
    assert "1,000." not in text


def test_a_card_that_is_not_ours_keeps_its_text() -> None:
    text, text_stays = with_edits_of("My own page.\n", card())
    assert text_stays
    assert "My own page." in text
    assert "# my-gpt2" not in text
    assert "license: mit" in text
    invalid = "---\n: not: [yaml\n---\nMy own page.\n"
    assert invalid.strip() in with_edits_of(invalid, card())[0]


def test_the_empty_card_of_a_new_repository_keeps_its_license_only() -> None:
    text, text_stays = with_edits_of("---\nlicense: odc-by\n---\n", card())
    assert not text_stays
    again, _ = with_edits_of(text, card(replace(FACTS, steps=20_000)))
    assert "license: odc-by" in again
    assert "20,000 steps" in again


@pytest.mark.parametrize("content", ["", "a\n", "\\1 and \\g<0>"])
def test_a_results_block_takes_any_text(content: str) -> None:
    block = "<!-- generated: results -->\n{}\n<!-- end of generated: results -->\n"
    old, new = block.format("old"), block.format(content)
    assert f"before\n{new}after" in with_edits_of(f"before\n{old}after\n", new)[0]
