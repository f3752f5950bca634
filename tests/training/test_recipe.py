"""Recipes: loaded, validated, rejected."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT

from common.cli_errors import InputError
from training.recipe import QUICKSTART, RECIPES, Recipe, load_recipe
from training.train import parse_command

MINIMAL = {"output_dir": "out", "data_dir": "data", "corpus": "fineweb", "max_steps": 10}


def write(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_included_recipe_loads_and_is_saved_to_an_equal_one(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_the_fineweb_recipe_has_the_classic_settings() -> None:
    recipe = load_recipe(RECIPES / "gpt2-124m-fineweb-edu.yaml")
    assert recipe.tokens_per_step == 524_288
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.max_steps) == (6e-4, 715, 19_073)
    assert (recipe.lr_scheduler_type, recipe.min_learning_rate_ratio, recipe.weight_decay) == ("cosine", 0.1, 0.1)
    assert (recipe.n_layer, recipe.n_head, recipe.n_embd, recipe.seq_len) == (12, 12, 768, 1024)


def test_every_key_has_a_line_of_documentation() -> None:
    assert all(len(key.metadata["help"]) > 5 for key in dataclasses.fields(Recipe))


def test_values_are_read_as_they_look(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    # YAML 1.1 reads 6e-4 as a string, `no` as False and 1_000 as a number.
    path.write_text(
        "output_dir: 1234\ndata_dir: d\ncorpus: c\nlearning_rate: 6e-4\nmixed_precision: no\n"
        "max_tokens: 1_000_000\nval_tokens: null\nweight_decay: 0\nshard_tokens: 1e6\n"
    )
    recipe = load_recipe(path)
    assert (recipe.output_dir, recipe.learning_rate, recipe.mixed_precision) == ("1234", 6e-4, "no")
    assert (recipe.max_tokens, recipe.val_tokens, recipe.shard_tokens) == (1_000_000, None, 1_000_000)
    assert isinstance(recipe.weight_decay, float)


def test_flags_override_the_file_and_a_length_replaces_the_files_length(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **MINIMAL)
    recipe = parse_command(
        ["--config", str(path), "--max_tokens", "5e6", "--compile", "true", "--sample_prompts", "a b", "c"]
    ).recipe
    assert (recipe.max_steps, recipe.max_tokens, recipe.compile) == (None, 5_000_000, True)
    assert recipe.sample_prompts == ["a b", "c"]


def test_without_config_the_quickstart_recipe_is_trained() -> None:
    command = parse_command([])
    assert (command.recipe, command.preflight) == (load_recipe(QUICKSTART), False)


def test_a_batch_size_is_a_number_or_auto(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **MINIMAL)
    for given, read in (("auto", "auto"), ("16", 16)):
        recipe = load_recipe(path, {"per_device_train_batch_size": given})
        assert recipe.per_device_train_batch_size == read
        recipe.save(tmp_path / "again.yaml")
        assert load_recipe(tmp_path / "again.yaml") == recipe
    for wrong in ("atuo", "0", "1.5"):
        with pytest.raises(InputError, match=r"per_device_train_batch_size: expected (at least 1|a whole number)"):
            load_recipe(path, {"per_device_train_batch_size": wrong})


def test_price_without_preflight_is_an_error() -> None:
    with pytest.raises(InputError, match="--price_per_gpu_hour needs --preflight"):
        parse_command(["--price_per_gpu_hour", "1.79"])
    with pytest.raises(InputError, match="did you mean preflight"):
        parse_command(["--prefligth"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rte": 1e-3}, "unknown recipe key 'learning_rte' in .*; did you mean learning_rate?"),
        ({"zzz": 1}, r"unknown recipe key 'zzz' in .*yaml$"),
        ({"n_layer": "many"}, "n_layer: expected a whole number, found 'many'"),
        ({"n_layer": 2.5}, "n_layer: expected a whole number, found 2.5"),
        ({"n_layer": True}, "n_layer: expected a whole number, found True"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, found 'fast'"),
        ({"learning_rate": 0}, "learning_rate: expected more than 0, found 0.0"),
        ({"learning_rate": ".nan"}, "learning_rate: expected a number"),
        ({"compile": "maybe"}, "compile: expected true or false, found 'maybe'"),
        (
            {"lr_scheduler_type": "cosin"},
            "lr_scheduler_type: expected one of cosine, linear, .*, found 'cosin'",
        ),
        ({"sample_prompts": "one"}, "sample_prompts: expected a list of strings, found 'one'"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and less than 1, found 1.0"),
        ({"max_steps": None}, "needs exactly one of max_steps, num_train_epochs, max_tokens; found none of them"),
        ({"max_tokens": 5}, "found max_steps and max_tokens$"),
        ({"max_steps": 0}, "max_steps: expected more than 0, found 0"),
        ({"seq_len": 64, "n_positions": 32}, "seq_len=64 exceeds n_positions=32; shorten seq_len"),
        ({"seq_len": 30, "seq_len_warmup_steps": 5}, "into quarters, but seq_len=30 is not divisible by 4; change seq"),
        ({"n_embd": 100, "n_head": 12}, "n_embd=100 is not divisible by n_head=12"),
        ({"corpus": None}, "corpus: expected a string, found None"),
        ({"decay_steps": 5}, "decay_steps has no effect with lr_scheduler_type cosine"),
        ({"decay_steps": 0, "lr_scheduler_type": "warmup_stable_decay"}, "decay_steps: expected more than 0"),
        ({"n_layer": 1e21}, "n_layer: expected a whole number, found 1e"),
        ({"n_layer": 10**9}, "n_layer: expected at least 1 and at most 10,000, found 1,000,000,000"),
        ({"n_layer": "9" * 5000}, "n_layer: expected a whole number, found '9{79}$"),
        ({"max_steps": None, "num_train_epochs": 1e300}, "num_train_epochs: expected more than 0 and at most 100,000"),
        ({"learning_rate": 10**400}, "learning_rate: expected a number"),
        ({"output_dir": "-run"}, "output_dir: -run begins with a dash, which commands read as a flag"),
        ({"seq_len": 1}, "seq_len: expected at least 2"),
        ({"output_dir": "a\0b"}, r"output_dir: 'a\\x00b' holds a NUL"),
        ({"profile_steps": "5-" + "9" * 20}, "profile_steps: expected FIRST-LAST"),
        ({"profile_steps": "12-10"}, "profile_steps: expected FIRST-LAST, such as 10-12, found 12-10"),
        ({"profile_steps": "0"}, "profile_steps: expected FIRST-LAST, such as 10-12, found 0"),
        ({"muon_momentum": 0.9}, "muon_momentum is for optimizer muon, not adamw; remove it, or change optimizer"),
        ({"embedding_learning_rate": 0.01}, "embedding_learning_rate is for optimizer muon, not adamw"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, "muon_momentum: expected at least 0 and less than 1, found 1.0"),
        ({"optimizer": "moun"}, "optimizer: expected one of adamw, muon, found 'moun'"),
        ({"spike_window": 1}, "spike_window: expected at least 2"),
        ({"max_skipped_steps": 0}, "max_skipped_steps: expected at least 1"),
    ],
)
def test_invalid_recipe_is_a_one_line_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **{**MINIMAL, **change})
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_each_optimizer_has_its_own_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **MINIMAL)
    adamw, muon = load_recipe(path), load_recipe(path, {"optimizer": "muon"})
    assert (adamw.learning_rate, adamw.weight_decay, adamw.muon_momentum) == (6e-4, 0.1, None)
    assert (muon.learning_rate, muon.weight_decay, muon.muon_momentum) == (0.02, 0.01, 0.95)
    assert [(recipe.adam_beta1, recipe.adam_beta2) for recipe in (adamw, muon)] == [(0.9, 0.95), (0.8, 0.99)]
    assert load_recipe(path, {"optimizer": "muon", "learning_rate": "0.03"}).learning_rate == 0.03


def test_an_optimizer_from_a_flag_replaces_the_files_and_its_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **MINIMAL, learning_rate=1e-3, adam_epsilon=1e-6)
    muon = load_recipe(path, {"optimizer": "muon"})
    assert (muon.learning_rate, muon.adam_epsilon) == (0.02, 1e-6)
    muon.save(tmp_path / "muon.yaml")
    adamw = load_recipe(tmp_path / "muon.yaml", {"optimizer": "adamw"})
    assert (adamw.learning_rate, adamw.muon_momentum) == (6e-4, None)


def test_a_model_to_start_from_has_its_own_sizes_unless_the_recipe_names_them(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", **MINIMAL, n_layer=4, n_embd=96)
    assert load_recipe(path).sizes == {"n_layer": 4, "n_head": 12, "n_embd": 96}
    started = load_recipe(path, {"init_from": "openai-community/gpt2"})
    assert started.sizes == {}
    started.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == started
    assert load_recipe(path, {"init_from": "openai-community/gpt2", "n_layer": "24"}).sizes == {"n_layer": 24}
    assert load_recipe(path, {"init_from": "none"}) == load_recipe(path)
    path = write(tmp_path / "recipe.yaml", **MINIMAL, n_layer=4, init_from="openai-community/gpt2")
    assert load_recipe(path).sizes == {"n_layer": 4}


def test_a_run_of_an_earlier_version_had_adamw(tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", **MINIMAL)
    recipe, muon = load_recipe(path), load_recipe(path, {"optimizer": "muon"})
    earlier = {key: value for key, value in recipe.to_dict().items() if key != "optimizer"}
    assert recipe.differences_from(earlier) == []
    assert muon.differences_from(earlier) == ["optimizer: adamw → muon"]
    assert muon.differences_from({}) == []  # of a file that cannot be read


def test_sizes_that_earlier_versions_wrote_beside_init_from_make_no_other_run(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "recipe.yaml", **MINIMAL, init_from="openai-community/gpt2"))
    earlier = {**recipe.to_dict(), "n_layer": 12, "n_head": 12, "n_embd": 768}
    assert recipe.differences_from(earlier) == []
    assert dataclasses.replace(recipe, n_layer=24).differences_from(earlier) == ["n_layer: 12 → 24"]


def test_missing_key_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", max_steps=10, corpus="fineweb")
    with pytest.raises(InputError, match="lacks output_dir, data_dir; add the key, or give it as a flag"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", r"is not valid YAML \(line \d\)"),
        ("- a\n- b\n", "holds no keys"),
        ("# " + "x" * (1 << 20), "is larger than 1,048,576 bytes"),
        ("", "holds no keys"),
        ("\xff\xfe", None),
    ],
)
def test_file_that_is_not_a_recipe_is_an_error(text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_missing_recipe_error_lists_the_included_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe at .*; the included ones are .*quickstart.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_card_lists_no_paths_and_nodes_share_all_but_local_settings() -> None:
    recipe = Recipe(**MINIMAL)
    assert "learning_rate" in recipe.values_with(on_card=True)
    assert not {"output_dir", "data_dir", "eval_data_dir", "hub_model_id"} & recipe.values_with(on_card=True).keys()
    assert recipe.values_with(per_node=False)["seed"] == 1337
    assert not {"output_dir", "data_dir", "report_to"} & recipe.values_with(per_node=False).keys()


def test_differences_list_only_what_makes_another_run() -> None:
    recipe = Recipe(**MINIMAL)
    other = dataclasses.replace(recipe, n_layer=6, seed=1, eval_steps=7, output_dir="elsewhere", max_steps=99)
    assert other.differences_from(recipe.to_dict()) == ["seed: 1337 → 1", "n_layer: 12 → 6"]


def run_train(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "training/train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_unknown_flag_is_one_line_on_standard_error() -> None:
    done = run_train("--learning_rat", "1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown flag --learning_rat; did you mean learning_rate?\n"


def test_help_lists_every_key_without_importing_torch() -> None:
    code = """
import sys
sys.argv = ["train.py", "--help"]
from training.train import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"--{key.name}" in done.stdout for key in dataclasses.fields(Recipe))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("seed: 1\nseed: 2", r"not valid YAML \(line 6\); the key seed appears twice"),
        ("max_steps: 1:30", r"\(line 5\); 1:30 is ambiguous: write a decimal number, or quote a text"),
        ("max_steps: 0123", "0123 is ambiguous"),
        ("learning_rate: 1:30.5", "1:30.5 is ambiguous"),
        ("seed: " + "9" * 5000, "9 is ambiguous"),
        ("[" * 5000, "is not valid YAML"),
        ("corpus: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_yaml_that_is_not_what_it_looks_like_is_refused(lines: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"output_dir: o\ndata_dir: d\ncorpus: c\nwarmup_steps: 1\n{lines}\n")
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_quoted_text_may_look_like_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **{**MINIMAL, "output_dir": "0123", "data_dir": "1:30"})
    recipe = load_recipe(path)
    assert (recipe.output_dir, recipe.data_dir) == ("0123", "1:30")
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_bytes_of_the_command_line_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", **MINIMAL)
    for flags in (["--output_dir", "a\udcff"], ["--sample_prompts", "a", "b\udcff"]):
        with pytest.raises(InputError, match="holds a NUL, or bytes that are not UTF-8"):
            parse_command(["--config", str(path), *flags])
