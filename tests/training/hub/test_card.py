"""The card: what it holds, that the Hub accepts it, and that a person's edits stay."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.loopback_writing import metadata_errors

from evaluation.results.references import VALIDATION_LOSS
from gpt2_scratch import GPT2ScratchConfig
from training.data.shards.manifest import Manifest
from training.data.sources.base import corpus_name
from training.hub.card import LOCAL_FILES, RunFacts, Score, model_card, write_model_card
from training.hub.card_merging import merged, section, stamped, was_edited
from training.hub.costs import running_costs
from training.hub.run_facts import known_base, known_corpus, note_start, run_facts, training_seconds
from training.monitoring.run_log import RunLog
from training.recipe import Recipe

FACTS = RunFacts(
    name="my-gpt2",
    parameters=124_439_808,
    steps=19_073,
    tokens=9_999_745_024,
    device="NVIDIA A100-SXM4-80GB",
    devices=8,
    seconds=7200.0,
    val_loss=3.0412,
    bits_per_byte=0.9,
    gzip_bits_per_byte=2.8,
    samples=["Hello, ```I'm``` a language model"],
    gpt2_tokens=True,
    corpus="fineweb-edu",
)
CONFIG = GPT2ScratchConfig()


def card(facts: RunFacts = FACTS, **changes: Any) -> str:
    keys = {"output_dir": "runs/x", "data_dir": "data/x", "corpus": "fineweb-edu", "max_steps": 10, **changes}
    return model_card(Recipe(**keys), facts, CONFIG)


def test_the_hub_accepts_the_card_and_reads_its_results() -> None:
    score = Score("acc_norm", "HellaSwag, by bytes", 0.31, "Rowan/hellaswag", "HellaSwag")
    base = "openai-community/gpt2"
    text = card(replace(FACTS, scores=[score], base_model=base), init_from=base)
    assert not metadata_errors({"content": text})
    data = huggingface_hub.ModelCard(text).data
    assert (data.pipeline_tag, data.license, data.library_name) == ("text-generation", "mit", "transformers")
    assert (data.datasets, data.base_model) == (["HuggingFaceFW/fineweb-edu"], "openai-community/gpt2")
    results = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    assert results == {
        ("HuggingFaceFW/fineweb-edu", "loss"): 3.0412,
        ("HuggingFaceFW/fineweb-edu", "bits_per_byte"): 0.9,
        ("Rowan/hellaswag", "acc_norm"): 0.31,
    }


def test_gpt2_stands_beside_a_loss_of_the_same_corpus_and_tokenizer_only() -> None:
    published = f"{VALIDATION_LOSS['fineweb-edu'][0].value:.4f}"
    assert f"| 3.0412 | {published} |" in card()
    assert "OpenAI GPT-2 124M" in card()
    for change in ({"seq_len": 512}, {"eval_tokens": 1_048_576}, {"corpus_config": "default"}, {"val_tokens": 10_000}):
        assert published not in card(**change), change
    assert published not in card(replace(FACTS, gpt2_tokens=False))
    assert published not in card(replace(FACTS, corpus="fineweb"))


def test_hours_cost_and_energy_are_told_with_how_they_were_estimated() -> None:
    text = card()
    assert "- Hardware: 8 × NVIDIA A100-SXM4-80GB" in text
    assert "US$ 32.00 (16.00 GPU-hours, US$ 2.00 assumed for one)" in text
    assert "about 6.40 kWh (GPU-hours × 400 W" in text
    assert "1,388,853 tokens/s" in text
    assert running_costs("2 CPU threads", 1, 60.0) == []


def test_a_run_that_went_on_elsewhere_tells_both_and_estimates_no_cost(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path), data_dir="data/x", corpus="fineweb-edu", max_steps=10)

    def told(**now: Any) -> str:
        facts = run_facts(recipe, tmp_path, steps=10, parameters=1, **now)
        return model_card(recipe, replace(facts, seconds=7200.0), CONFIG)

    a100, h100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
    note_start(tmp_path, 0, a100, 8)
    note_start(tmp_path, 4, a100, 8)  # stopped and started again
    assert f"- Hardware: 8 × {a100}\n" in told()  # by hand, later
    assert "- Cost: about US$ 32.00" in told(device=a100, devices=8)
    note_start(tmp_path, 6, h100, 1)
    text = told(device=h100)
    assert f"- Hardware: 8 × {a100}, then {h100}\n" in text
    assert "Cost" not in text
    assert "Energy" not in text
    note_start(tmp_path, 6, a100, 8)  # from the same checkpoint again: the other start's steps are gone
    assert "- Cost" in told()


@pytest.mark.parametrize(
    ("device", "watts"),
    [
        ("NVIDIA A100-SXM4-40GB", 400),
        ("NVIDIA A100-PCIE-40GB", 250),
        ("NVIDIA A100 80GB PCIe", 300),
        ("NVIDIA H100 80GB HBM3", 700),
        ("NVIDIA H100 PCIe", 350),
        ("NVIDIA H100 NVL", 400),
        ("NVIDIA H200 NVL", 600),
        ("NVIDIA GH200 480GB", 700),
        ("NVIDIA GeForce RTX 4090", 450),
    ],
)
def test_boards_with_like_names_have_their_own_power(device: str, watts: int) -> None:
    assert f"× {watts} W" in running_costs(device, 1, 3600.0)[1]


def test_nothing_is_estimated_for_the_laptops_board_of_the_same_name() -> None:
    assert running_costs("NVIDIA GeForce RTX 4090 Laptop GPU", 1, 3600.0) == []


def test_seconds_are_those_of_steps_over_all_starts_of_a_run() -> None:
    lines = [
        {"tokens": 1000.0, "tokens_per_second": 100.0},
        {"tokens": 3000.0, "tokens_per_second": 1000.0},
    ]
    assert training_seconds(lines) == 10 + 2
    assert training_seconds([]) is None


def test_a_small_model_has_parameters_too() -> None:
    assert "A GPT-2 with 41,216 parameters (" in card(replace(FACTS, parameters=41_216))
    assert "A GPT-2 with 124.4M parameters (" in card()


def test_a_card_has_the_samples_of_an_earlier_start(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path), data_dir="data/x", corpus="fineweb-edu", max_steps=10)
    log = RunLog(tmp_path, enabled=True, first_step=0, total_steps=10)
    log.samples(4, ["The first\n\nstep 9 of it", "The second"], show=False)
    log.samples(8, ["Later"], show=False)
    log.close()
    assert run_facts(recipe, tmp_path, steps=6, parameters=1).samples == ["The first\n\nstep 9 of it", "The second"]
    assert run_facts(recipe, tmp_path, steps=2, parameters=1).samples == []


def test_a_card_before_the_first_validation_claims_nothing() -> None:
    text = card(replace(FACTS, val_loss=None, bits_per_byte=None, gzip_bits_per_byte=None, samples=[]))
    assert not metadata_errors({"content": text})
    assert "Nothing was measured yet." in text
    assert "model-index" not in text


def test_language_and_licence_are_claimed_only_where_they_are_known() -> None:
    assert "language: en" in card()
    for corpus in ("someone/their-texts", LOCAL_FILES, None):
        other = card(replace(FACTS, corpus=corpus))
        assert "language:" not in other
        assert "license:" not in other
    openai, theirs = "openai-community/gpt2-medium", "someone/their-gpt2"
    assert "license: mit" in card(replace(FACTS, base_model=openai), init_from=openai)
    assert "license:" not in card(replace(FACTS, corpus="installed-docs"))  # of many packages, each with its own
    other = card(replace(FACTS, base_model=theirs), init_from=theirs)
    assert "license:" not in other
    assert "trained from [someone/their-gpt2](https://huggingface.co/someone/their-gpt2)" in other
    assert "had learnt before" in other


def test_a_picture_stands_in_the_card_where_there_is_one(tmp_path: Path) -> None:
    recipe = Recipe(output_dir="runs/x", data_dir="data/x", corpus="fineweb-edu", max_steps=10)
    write_model_card(tmp_path, recipe, FACTS, CONFIG)
    assert "curves.png" not in (tmp_path / "README.md").read_text()
    (tmp_path / "curves.png").write_bytes(b"")
    write_model_card(tmp_path, recipe, FACTS, CONFIG)
    assert "![Loss against tokens](curves.png)" in (tmp_path / "README.md").read_text()


def test_the_tokenizer_and_how_samples_were_drawn_are_told_and_unknown_hardware_is_not() -> None:
    text = card(replace(FACTS, device=None), tokenizer="train:4096", eval_data_dir="my/tasks")
    assert "- Tokenizer: a byte-level BPE trained on this corpus, 50,257 ids" in text
    assert "temperature 0.8 from the 50 likeliest tokens" in text
    assert "Hardware" not in text
    assert "None" not in text
    assert "my/tasks" not in text
    assert "eval_task" not in text
    assert "- Tokenizer: GPT-2's byte-level BPE" in card()


def test_paths_of_the_machine_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    place = str(tmp_path / "secret")
    text = card(corpus=place, init_from=place, tokenizer=place, hub_model_id="me/private-name")
    assert str(tmp_path) not in text
    assert "me/private-name" not in text
    assert "secret" not in text
    assert not metadata_errors({"content": text})


REVISION_OF_FILES, COMMIT = "0" * 64, "0" * 40


def known(folder: Path, corpus: str, revision: str, **changes: Any) -> str:
    """The card of a run on shards with a manifest, whose corpus and base are not there any more."""
    manifest = Manifest(
        corpus=corpus_name(corpus),
        corpus_config=None,
        corpus_revision=revision,
        text_field="text",
        tokenizer="gpt2",
        tokenizer_fingerprint="",
        vocab_size=50_257,
        end_of_text_id=50_256,
        dtype="uint16",
        shard_tokens=10,
        val_tokens=10,
        max_tokens=None,
    )
    folder.mkdir(exist_ok=True)
    manifest.write(folder)
    recipe = Recipe(output_dir="runs/x", data_dir=str(folder), corpus=corpus, max_steps=10, **changes)
    facts = replace(FACTS, corpus=known_corpus(recipe), base_model=known_base(recipe.init_from))
    text = model_card(recipe, facts, CONFIG)
    assert not metadata_errors({"content": text})
    return text


@pytest.mark.parametrize("corpus", ["/home/alice/corpus.jsonl", "/alice.jsonl", "data/alice", "alice", "../alice"])
def test_files_that_are_gone_are_neither_named_nor_taken_for_a_dataset(corpus: str, tmp_path: Path) -> None:
    text = known(tmp_path, corpus, REVISION_OF_FILES, init_from="runs/alice")
    assert "alice" not in text
    assert "trained from an earlier model on local files:" in text
    assert "datasets:" not in text
    assert "base_model:" not in text


def test_a_dataset_of_the_hub_is_known_by_the_commit_in_the_manifest(tmp_path: Path) -> None:
    assert "datasets:\n- someone/their-texts\n" in known(tmp_path, "someone/their-texts", COMMIT)


def test_shards_of_another_program_are_not_said_to_be_of_the_recipes_corpus(tmp_path: Path) -> None:
    recipe = Recipe(output_dir="runs/x", data_dir=str(tmp_path), corpus="installed-docs", max_steps=10)
    text = model_card(recipe, replace(FACTS, corpus=known_corpus(recipe)), CONFIG)
    assert "shards of token ids that do not say what they are of" in text
    for claim in ("installed-docs", "language:", "license:", "datasets:", "Python packages"):
        assert claim not in text


def test_what_a_person_wrote_stays_and_the_generated_sections_are_new(tmp_path: Path) -> None:
    recipe = Recipe(output_dir="runs/x", data_dir="data/x", corpus="fineweb-edu", max_steps=10)
    write_model_card(tmp_path, recipe, FACTS, CONFIG)
    path = tmp_path / "README.md"
    edited = (
        path.read_text().replace("## Results", "## Results\n\nI like these.").replace("license: mit", "license: odc-by")
    )
    edited = edited.replace(edited[edited.index("## Samples") : edited.index("## Training")], "")
    path.write_text(edited)
    write_model_card(tmp_path, recipe, replace(FACTS, val_loss=2.9), CONFIG, kept=edited)
    again = path.read_text()
    assert "I like these." in again
    assert "license: odc-by" in again
    assert "| 2.9000 |" in again
    assert "3.0412" not in again
    assert "Samples" not in again  # removed by a person, with its marks
    assert again.count("# my-gpt2") == 1


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
    data = huggingface_hub.ModelCard(merged(card(), theirs)).data
    assert {result.dataset_type for result in data.eval_results} == {"org/other", "HuggingFaceFW/fineweb-edu"}


def test_results_of_a_later_step_take_the_place_of_the_earlier_ones_and_name_it() -> None:
    score = Score("acc", "acc, protocol `harness`, after step 1,000", 0.2, "Rowan/hellaswag", "HellaSwag")
    old = card(replace(FACTS, val_step=1_000, scores=[score]))
    later = replace(score, name="acc, protocol `harness`, after step 19,073", value=0.3)
    text = merged(card(replace(FACTS, val_step=19_000, scores=[later])), old)
    names = [result.metric_name for result in huggingface_hub.ModelCard(text).data.eval_results]
    assert len(names) == 3
    assert names[0].endswith("side by side, after step 19,000")
    assert names[2] == later.name


def test_a_card_without_marks_keeps_its_text_before_ours() -> None:
    text = merged(card(), "My own page.\n")
    assert text.index("My own page.") < text.index("# my-gpt2")
    broken = "---\n: not: [yaml\n---\nMy own page.\n"
    assert broken.strip() in merged(card(), broken)


def test_a_stamp_tells_a_person_from_our_next_push() -> None:
    pushed = stamped(card())
    assert not was_edited(pushed)
    assert not was_edited(merged(card(replace(FACTS, val_loss=1.0)), pushed) + pushed[pushed.rindex("<!-- pushed") :])
    assert was_edited(pushed.replace("# my-gpt2", "# my very own gpt2"))
    assert was_edited(pushed.replace("license: mit", "license: odc-by"))
    assert was_edited("anything")
    assert stamped(pushed) == pushed


@pytest.mark.parametrize("content", ["", "a\n", "\\1 and \\g<0>"])
def test_a_section_takes_any_text(content: str) -> None:
    old, new = section("use", "old"), section("use", content)
    assert merged(new, f"before\n{old}after\n") == f"before\n{new}after\n"
