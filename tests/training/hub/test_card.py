"""The model card: what it holds, and that the Hub accepts it."""

import re
from dataclasses import replace
from email import message_from_string
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from support.cards import CONFIG, FACTS, card, hellaswag
from support.loopback_writing import metadata_errors
from support.paths import ROOT

from evaluation.results.references import VALIDATION_LOSS
from gpt2_scratch import GPT2ScratchConfig
from gpt2_scratch.export import native_card
from training.data.shards.manifest import Manifest
from training.data.sources.base import corpus_name
from training.hub.card import card_for_repository, model_card, write_model_card
from training.hub.provenance import LOCAL_FILES, Provenance
from training.monitoring.run_history import RunHistory, Start, training_seconds
from training.monitoring.run_log import RunLog
from training.recipe import Recipe


def test_the_hub_accepts_the_card_and_reads_its_results() -> None:
    base = "openai-community/gpt2"
    facts = replace(FACTS, task_results=hellaswag(0.31, step=19_073))
    text = card(facts, Provenance("fineweb-edu", base), init_from=base)
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


def test_openais_loss_is_shown_only_for_the_same_text_tokens_and_windows() -> None:
    published = f"{VALIDATION_LOSS['fineweb-edu'][0].value:.4f}"
    assert (
        "| Model | Loss ↓ | Bits per byte ↓ |\n| --- | ---: | ---: |\n| **This model** | **3.0412** | **0.9000** |\n"
        in card()
    )
    assert f"\n| OpenAI GPT-2 124M | {published} |  |\n" in card()
    for change in (
        *({"seq_len": 512}, {"eval_tokens": 1_048_576}, {"corpus_config": "default"}, {"val_tokens": 10_000}),
        {"tokenizer": "train:4096"},
    ):
        assert published not in card(**change), change
    assert published not in card(provenance=Provenance("fineweb"))


def test_results_have_one_column_a_metric_and_their_protocols_below() -> None:
    text = card(replace(FACTS, task_results=hellaswag(0.31, step=19_073)))
    assert "| Model | Loss ↓ | Bits per byte ↓ | HellaSwag acc_norm ↑ |\n" in text
    assert "| **This model** | **3.0412** | **0.9000** | **0.3100** |\n" in text
    assert re.search(r"\n\| OpenAI GPT-2 124M \| 3\.\d{4} \|  \| 0\.\d{4} \|\n", text)
    assert "\n- HellaSwag acc_norm: HellaSwag, acc_norm, protocol harness\n" in text


def test_the_card_has_a_widget_a_folded_recipe_and_how_to_get_other_formats() -> None:
    text = card(sample_prompts=["", "Once upon", "The"])
    assert huggingface_hub.ModelCard(text).data.widget == [{"text": "Once upon"}, {"text": "The"}]
    recipe = text[text.index("<details><summary>Recipe</summary>\n\n| Recipe key") : text.index("\n\n</details>\n")]
    assert "| `learning_rate` | 0.0006 |" in recipe
    assert "--output native --format gpt2`: plain GPT-2" in text
    assert "--output model.gguf --format gguf`: a file for llama.cpp" in text
    native = card_for_repository(text, "me/x", branch="native", has_native=True)
    assert 'pipeline("text-generation", "me/x", revision="native")' in native


@pytest.mark.parametrize(
    ("urls", "kit"),
    [
        ([], "gpt2-scratch"),
        (["Project-URL: Issues, https://a.test/issues"], "gpt2-scratch"),
        (["Project-URL: Homepage, https://a.test"], "[gpt2-scratch](https://a.test)"),
        (["Home-page: https://a.test"], "[gpt2-scratch](https://a.test)"),
        (
            ["Project-URL: Homepage, https://a.test", "Project-URL: Source, https://b.test"],
            "[gpt2-scratch](https://b.test)",
        ),
    ],
)
def test_the_card_links_to_the_kit_if_the_package_states_an_address(
    urls: list[str], kit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = message_from_string("\n".join(["Name: gpt2-scratch", *urls, "", ""]))
    monkeypatch.setattr("importlib.metadata.metadata", lambda _: metadata)
    assert f"tokens in total, on 8 × NVIDIA A100-SXM4-80GB,\nwith {kit}.\n" in card()


def test_the_card_shows_hardware_software_and_hours() -> None:
    text = card(replace(FACTS, software="torch 2.13.0, transformers 5.23.0"))
    assert "- Software: gpt2-scratch with torch 2.13.0, transformers 5.23.0\n" in text
    assert "Software" not in card()  # a run of an earlier version
    assert "- Hardware: 8 × NVIDIA A100-SXM4-80GB" in text
    assert "- Time: 2 h 00 min of training steps (1,388,853 tokens/s)" in text


def test_a_run_that_resumed_on_other_hardware_names_both(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path), data_dir="data/x", corpus="fineweb-edu", max_steps=10)

    def hardware() -> tuple[str, ...]:
        return RunHistory.load(tmp_path).facts(recipe, steps=10, parameters=1).hardware

    assert hardware() == ()
    a100, h100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
    RunHistory.load(tmp_path).add_start(tmp_path, Start(0, a100, 8))
    RunHistory.load(tmp_path).add_start(tmp_path, Start(4, a100, 8))  # stopped and resumed
    assert hardware() == (f"8 × {a100}",)
    RunHistory.load(tmp_path).add_start(tmp_path, Start(6, h100, 1))
    assert hardware() == (f"8 × {a100}", h100)
    assert f"- Hardware: 8 × {a100}, then {h100}\n" in card(replace(FACTS, hardware=hardware()))
    RunHistory.load(tmp_path).add_start(tmp_path, Start(6, a100, 8))  # resumed again: the other start's steps are gone
    assert hardware() == (f"8 × {a100}",)
    RunHistory().add_start(tmp_path, Start(6, a100, 8))  # a run folder of an earlier version, without starts
    assert hardware() == ("unknown hardware", f"8 × {a100}")


def test_training_seconds_are_summed_over_all_starts() -> None:
    lines = [
        {"tokens": 1000.0, "tokens_per_second": 100.0},
        {"tokens": 3000.0, "tokens_per_second": 1000.0},
    ]
    assert training_seconds(lines) == 10 + 2
    assert training_seconds([]) is None


def test_parameters_of_small_and_large_models() -> None:
    assert "A GPT-2 with 41,216 parameters (" in card(replace(FACTS, parameters=41_216))
    assert "A GPT-2 with 124.4M parameters (" in card()


def test_facts_have_the_newest_samples_up_to_their_step(tmp_path: Path) -> None:
    recipe = Recipe(output_dir=str(tmp_path), data_dir="data/x", corpus="fineweb-edu", max_steps=10)
    log = RunLog(tmp_path, enabled=True, first_step=0, total_steps=10)
    log.samples(4, ["The first\n\nstep 9 of it", "The second"], show=False)
    log.samples(8, ["Later"], show=False)
    log.close()
    for history in (log.history, RunHistory.load(tmp_path)):  # in memory, and read from the folder
        samples = [history.facts(recipe, steps=steps, parameters=1).samples for steps in (6, 2)]
        assert samples == [("The first\n\nstep 9 of it", "The second"), ()]


def test_a_card_before_the_first_validation_has_no_results() -> None:
    text = card(replace(FACTS, val_loss=None, bits_per_byte=None, gzip_bits_per_byte=None, samples=()))
    assert not metadata_errors({"content": text})
    assert "The model has not been evaluated yet." in text
    assert "model-index" not in text


def test_language_and_license_are_given_only_where_they_are_known() -> None:
    assert "language: en" in card()
    for corpus in ("someone/their-texts", LOCAL_FILES, None):
        other = card(provenance=Provenance(corpus))
        assert "language:" not in other
        assert "license:" not in other
    openai, theirs = "openai-community/gpt2-medium", "someone/their-gpt2"
    assert "license: mit" in card(provenance=Provenance("fineweb-edu", openai), init_from=openai)
    assert "license:" not in card(provenance=Provenance("installed-docs"))  # of many packages, each with its own
    other = card(provenance=Provenance("fineweb-edu", theirs), init_from=theirs)
    assert "license:" not in other
    assert "trained from [someone/their-gpt2](https://huggingface.co/someone/their-gpt2)" in other
    assert "inherits what its base model learned" in other


def test_the_card_shows_the_curves_if_the_folder_has_them(tmp_path: Path) -> None:
    recipe = Recipe(output_dir="runs/x", data_dir="data/x", corpus="fineweb-edu", max_steps=10)
    write_model_card(tmp_path, recipe, FACTS, CONFIG)
    assert "curves.png" not in (tmp_path / "README.md").read_text()
    (tmp_path / "curves.png").write_bytes(b"")
    write_model_card(tmp_path, recipe, FACTS, CONFIG)
    assert "![Loss against tokens](curves.png)" in (tmp_path / "README.md").read_text()


def test_the_card_describes_tokenizer_and_sampling_and_omits_what_is_unknown() -> None:
    text = card(replace(FACTS, hardware=()), tokenizer="train:4096", eval_data_dir="my/tasks")
    assert "- Tokenizer: a byte-level BPE trained on this corpus, 50,257 tokens" in text
    assert "temperature 0.8, top-k 50" in text
    assert "Hardware" not in text
    assert "None" not in text
    assert "my/tasks" not in text
    assert "eval_task" not in text
    assert "- Tokenizer: GPT-2's byte-level BPE" in card()


def test_paths_of_the_machine_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    path = str(tmp_path / "secret")
    text = card(corpus=path, init_from=path, tokenizer=path, hub_model_id="me/private-name")
    assert str(tmp_path) not in text
    assert "me/private-name" not in text
    assert "secret" not in text
    assert not metadata_errors({"content": text})


REVISION_OF_FILES, COMMIT = "0" * 64, "0" * 40


def known(folder: Path, corpus: str, revision: str, **changes: Any) -> str:
    """The card of a run on shards with a manifest, whose corpus and base model were deleted."""
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
    text = model_card(recipe, FACTS, CONFIG, Provenance.of(recipe))
    assert not metadata_errors({"content": text})
    return text


@pytest.mark.parametrize("corpus", ["/home/alice/corpus.jsonl", "/alice.jsonl", "data/alice", "alice", "../alice"])
def test_deleted_local_files_are_neither_named_nor_taken_for_a_dataset(corpus: str, tmp_path: Path) -> None:
    text = known(tmp_path, corpus, REVISION_OF_FILES, init_from="runs/alice")
    assert "alice" not in text
    assert "trained from an earlier model on local files:" in text
    assert "datasets:" not in text
    assert "base_model:" not in text


def test_a_dataset_of_the_hub_is_recognized_by_the_commit_in_the_manifest(tmp_path: Path) -> None:
    assert "datasets:\n- someone/their-texts\n" in known(tmp_path, "someone/their-texts", COMMIT)


def test_the_corpus_of_another_programs_shards_is_unknown(tmp_path: Path) -> None:
    recipe = Recipe(output_dir="runs/x", data_dir=str(tmp_path), corpus="installed-docs", max_steps=10)
    text = model_card(recipe, FACTS, CONFIG, Provenance.of(recipe))
    assert "token shards of unknown origin" in text
    for claim in ("installed-docs", "language:", "license:", "datasets:", "Python packages"):
        assert claim not in text


def test_the_card_on_the_hub_has_the_models_id_and_mentions_the_native_branch() -> None:
    text = card_for_repository(card(), "me/x", branch="main", has_native=True)
    assert 'from_pretrained("me/x", trust_remote_code=True)' in text
    assert '`revision="native"`' in text
    native = card_for_repository(card(), "me/x", branch="native", has_native=True)
    assert 'AutoModelForCausalLM.from_pretrained("me/x", revision="native")' in native
    assert "trust_remote_code" not in native


@pytest.mark.parametrize("has_native", [True, False])
def test_the_card_of_an_exported_native_folder_says_nothing_of_our_code(has_native: bool) -> None:
    local = native_card(card())
    downloaded = native_card(card_for_repository(card(), "me/x", branch="main", has_native=has_native))
    assert downloaded == local
    published = card_for_repository(card(), "me/x", branch="native", has_native=True)
    assert published.replace('"me/x", revision="native"', '"path/to/this/folder"') == local
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in local
    for text in ("trust_remote_code", "import gpt2_scratch", "this code", "native", "\n\n\n"):
        assert text not in local


def test_other_cards_keep_their_blank_lines_in_an_export() -> None:
    text = "# Mine\n\n\nload(path, trust_remote_code=True)\n\n\nEnd\n"
    assert native_card(text) == "# Mine\n\n\nload(path)\n\n\nEnd\n"


def test_an_export_does_not_take_a_revision_in_a_card_for_a_repository() -> None:
    text = 'load("me/x", revision="v1", trust_remote_code=True)\nload("me/x", trust_remote_code=True)\n'
    assert native_card(text) == 'load("me/x", revision="v1")\nload("path/to/this/folder")\n'


def test_one_layer_is_no_layers() -> None:
    config = GPT2ScratchConfig(n_layer=1, n_head=1)
    recipe = Recipe(output_dir="runs/x", data_dir="data/x", corpus="fineweb-edu", max_steps=1)
    text = model_card(recipe, replace(FACTS, steps=1), config, Provenance("fineweb-edu"))
    assert "(1 layer, 1 head,\n" in text
    assert "\n1 step of " in text
    assert " in 1 step\n" in text
    assert "(12 layers, 12 heads,\n" in card()


def test_card_names_the_versions_of_transformers_that_setup_cfg_allows() -> None:
    requirement = re.search(r"transformers>=5\.(\d+),<5\.(\d+)\n", (ROOT / "setup.cfg").read_text())
    oldest, too_new = map(int, requirement.groups())
    assert f"works with transformers 5.{oldest} to 5.{too_new - 1}." in card()


def test_card_gives_the_command_that_renews_the_code_of_the_published_model() -> None:
    command = 'python -m gpt2_scratch.export --model "me/tiny" --output renewed --format gpt2_scratch'
    assert command in card_for_repository(card(), "me/tiny", branch="main", has_native=False)
    assert "gpt2_scratch.export" not in card_for_repository(card(), "me/tiny", branch="native", has_native=True)
