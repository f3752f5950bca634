import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.launching import run_python
from support.model_folders import (  # noqa: F401 - a fixture
    SIZES,
    TRICKY,
    change_config,
    change_json,
    contents,
    export,
    refusal,
    save,
    scratch,
)
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.cli_errors import run_command
from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchForTokenClassification,
    GPT2ScratchModel,
)


@pytest.mark.parity
def test_round_trip_of_our_folder_returns_every_byte_except_the_card(scratch, tmp_path):
    export(scratch, tmp_path / "native", "gpt2")
    export(tmp_path / "native", tmp_path / "again", "gpt2_scratch")
    before, after = contents(scratch), contents(tmp_path / "again")
    assert before.keys() == after.keys()
    assert "tokenizer.json" in before
    assert [name for name in before if before[name] != after[name]] == ["README.md"]


@pytest.mark.parity
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_round_trip_of_an_official_folder_returns_every_byte(tmp_path, tie_word_embeddings):
    official = GPT2LMHeadModel(GPT2Config(**SIZES, tie_word_embeddings=tie_word_embeddings))
    official.save_pretrained(tmp_path / "native")
    change_config(tmp_path / "native", n_ctx=SIZES["n_positions"])  # as in OpenAI's folders
    export(tmp_path / "native", tmp_path / "ours", "gpt2_scratch")
    export(tmp_path / "ours", tmp_path / "again", "gpt2")
    assert contents(tmp_path / "native") == contents(tmp_path / "again")
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in official.state_dict().items())
    assert ("lm_head.weight" in load_file(tmp_path / "again" / "model.safetensors")) is not tie_word_embeddings


@pytest.mark.parity
def test_native_folder_equals_one_saved_by_the_official_class(scratch, tmp_path):
    export(scratch, tmp_path / "native", "gpt2")
    GPT2LMHeadModel.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "official")
    native, official = contents(tmp_path / "native"), contents(tmp_path / "official")
    assert native["model.safetensors"] == official["model.safetensors"]
    assert json.loads(native["config.json"]).items() <= json.loads(official["config.json"]).items()


def test_native_folder_holds_no_trace_of_our_code(scratch, tmp_path, capsys):
    export(scratch, tmp_path / "native", "gpt2")
    assert "model_type gpt2, GPT2LMHeadModel, 21,432 parameters" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "native").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "curves.png"} < names
    assert not any(name.endswith(".py") for name in names)
    assert "training_state" not in names
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert "auto_map" not in config
    assert config["n_ctx"] == SIZES["n_positions"]
    card = (tmp_path / "native" / "README.md").read_text()
    assert 'from_pretrained("path/to/this/folder")' in card
    assert "scratch" not in card
    assert "trust" not in card


@pytest.mark.parametrize("saved_as", ["PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize(
    ("pre_tokenizer", "expected"),
    [(pre_tokenizers.ByteLevel(add_prefix_space=False), "GPT2Tokenizer"), (None, "PreTrainedTokenizerFast")],
)
def test_native_tokenizer_has_a_class_and_inputs_that_transformers_4_knows(
    scratch, tmp_path, saved_as, pre_tokenizer, expected
):
    shutil.copytree(scratch, tmp_path / "model")
    backend = Tokenizer.from_file(str(scratch / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.Metaspace()
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    change_json(tmp_path / "model" / "tokenizer_config.json", tokenizer_class=saved_as)
    export(tmp_path / "model", tmp_path / "native", "gpt2")
    config = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == expected
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "native"))
    for text in TRICKY:
        expected_encoding, encoding = (one(text, return_offsets_mapping=True) for one in (before, after))
        assert encoding.data == expected_encoding.data
        assert after.decode(encoding["input_ids"]) == before.decode(expected_encoding["input_ids"])


NATIVE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline
torch.set_num_threads(1)
model = GPT2LMHeadModel.from_pretrained("native").eval()
assert type(AutoModelForCausalLM.from_pretrained("native")) is GPT2LMHeadModel
torch.save(model(torch.arange(20).view(1, 20)).logits, "logits.pt")
writer = pipeline("text-generation", "native")
assert writer.model.generation_config.temperature == 0.7
print(writer("Once upon", max_new_tokens=4)[0]["generated_text"][:9])
assert "gpt2_scratch" not in sys.modules
"""


@pytest.mark.parity
@pytest.mark.slow
def test_native_folder_loads_in_a_process_without_our_package(scratch, tmp_path):
    export(scratch, tmp_path / "native", "gpt2")
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", NATIVE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "Once upon\n"
    expected = GPT2ScratchForCausalLM.from_pretrained(scratch)(torch.arange(20).view(1, 20)).logits
    # Both take sdpa; this process may have two threads, which sum in another order.
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-5)


def test_dtype_casts_every_weight_and_is_recorded_in_the_config(scratch, tmp_path):
    export(scratch, tmp_path / "half", "gpt2", "--dtype", "bfloat16")
    before, after = load_file(scratch / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight.bfloat16()) for name, weight in before.items())
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    export(tmp_path / "half", tmp_path / "ours", "gpt2_scratch")
    assert GPT2ScratchForCausalLM.from_pretrained(tmp_path / "ours").dtype == torch.bfloat16


def test_casting_to_the_same_dtype_changes_no_byte(scratch, tmp_path):
    export(scratch, tmp_path / "same", "gpt2_scratch", "--dtype", "float32")
    assert contents(tmp_path / "same") | {"README.md": b""} == contents(scratch) | {"README.md": b""}


def test_dtype_that_cannot_hold_a_weight_is_refused(tmp_path, capsys):
    model = GPT2ScratchForCausalLM(GPT2ScratchConfig(**SIZES))
    model.transformer.wte.weight.data[3, 4] = 1e6
    model.save_pretrained(tmp_path / "model")
    message = refusal(capsys, tmp_path / "model", tmp_path / "half", "gpt2", "--dtype", "float16")
    assert "transformer.wte.weight holds 1e+06, too large for torch.float16; use --dtype bfloat16" in message


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16")])
def test_sharded_weights_stay_sharded(tmp_path, dtype):
    model = save(GPT2ScratchForCausalLM, tmp_path / "model", {"max_shard_size": "30KB"})
    export(tmp_path / "model", tmp_path / "native", "gpt2", *dtype)
    assert len(list((tmp_path / "native").glob("model-*.safetensors"))) > 2
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "native").state_dict()
    expected = model.to(torch.bfloat16 if dtype else torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    if not dtype:
        weights = {name: content for name, content in contents(tmp_path / "model").items() if "safetensors" in name}
        assert weights.items() <= contents(tmp_path / "native").items()
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 21_432 * (2 if dtype else 4)


def test_old_weight_names_of_official_checkpoints_are_understood_and_kept(tmp_path):
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(tmp_path / "native")
    path = tmp_path / "native" / "model.safetensors"
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(path).items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, path, metadata={"format": "pt"})
    export(tmp_path / "native", tmp_path / "ours", "gpt2_scratch")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == path.read_bytes()
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[f"transformer.{name}"], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("model_class", "official"),
    [
        (GPT2ScratchModel, "GPT2Model"),
        (GPT2ScratchForSequenceClassification, "GPT2ForSequenceClassification"),
        (GPT2ScratchForTokenClassification, "GPT2ForTokenClassification"),
        (GPT2ScratchForQuestionAnswering, "GPT2ForQuestionAnswering"),
    ],
)
def test_models_with_another_head_keep_it(tmp_path, model_class, official):
    save(model_class, tmp_path / "model", num_labels=5)
    export(tmp_path / "model", tmp_path / "native", "gpt2")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["architectures"] == [official]
    export(tmp_path / "native", tmp_path / "again", "gpt2_scratch")
    assert contents(tmp_path / "model") == contents(tmp_path / "again")


def test_existing_output_is_refused_and_unchanged(scratch, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("years of work")
    assert f"{tmp_path / 'there'} exists" in refusal(capsys, scratch, tmp_path / "there")
    assert contents(tmp_path / "there") == {"thesis.txt": b"years of work"}


def test_interrupted_export_leaves_no_folder_and_can_be_repeated(scratch, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gpt2_scratch.export.write_config", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(scratch, tmp_path / "native", "gpt2")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".unfinished-native").mkdir()  # left by a killed export
    (tmp_path / ".unfinished-native" / "half.safetensors").touch()
    export(scratch, tmp_path / "native", "gpt2")
    assert [path.name for path in tmp_path.iterdir()] == ["native"]
    assert "half.safetensors" not in contents(tmp_path / "native")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "has model_type 'llama'; expected gpt2 or gpt2_scratch"),
        ({"model_type": None}, "has model_type None"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not implemented"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True is not implemented"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
        ({"n_head": 5}, "n_embd=24 and n_head=5"),
        ({"n_layer": "two"}, "n_layer"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "names the architecture GPT2DoubleHeadsModel"),
        ({"n_layer": 3}, r"lacks h.2.attn.c_attn.bias, .* \(12 in total\)"),
        ({"n_layer": 1}, r"adds h.1.attn.c_attn.bias, .* \(12 in total\)"),
        ({"n_positions": 48}, r"wpe.weight in .* has shape \(32, 24\) instead of \(48, 24\)"),
        ({"tie_word_embeddings": False}, r"lacks lm_head.weight \(1 in total\)"),
    ],
)
def test_config_of_another_model_is_refused(scratch, tmp_path, capsys, changes, message):
    shutil.copytree(scratch, tmp_path / "model")
    change_config(tmp_path / "model", **changes)
    found = refusal(capsys, tmp_path / "model", tmp_path / "native")
    assert re.search(message, found), found


def break_config(folder):
    (folder / "config.json").write_text("{")


def remove_config(folder):
    (folder / "config.json").unlink()


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    remove_weights(folder)
    (folder / "pytorch_model.bin").touch()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def lose_a_shard(folder):
    remove_weights(folder)
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json: Expecting property name"),
        (remove_config, "config.json: [Errno 2] No such file"),
        (remove_weights, "no model.safetensors in"),
        (pickle_weights, "only pytorch_model.bin; if you trust it, load the model with use_safetensors=False"),
        (cut_weights, "model.safetensors is corrupted"),
        (lose_a_shard, "lists the shard 'model-00001-of-00002.safetensors', which is missing"),
    ],
)
def test_incomplete_or_corrupted_folder_is_refused(scratch, tmp_path, capsys, damage, message):
    shutil.copytree(scratch, tmp_path / "model")
    damage(tmp_path / "model")
    assert message in refusal(capsys, tmp_path / "model", tmp_path / "native")


def test_model_that_does_not_exist_is_refused(tmp_path, capsys):
    path = str(tmp_path / "nothing")
    assert f"there is no folder or file '{path}'; check --model" in refusal(capsys, path, tmp_path / "native")
    for name in ("nobody/nothing", "a bad name"):
        assert f"--model '{name}' is neither a folder nor a repository on the Hub" in refusal(
            capsys, name, tmp_path / "native"
        )


def test_folder_that_cannot_be_written_is_refused(scratch, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        run_command(lambda: export(scratch, tmp_path / "file" / "native", "gpt2"))
    assert f"cannot write {tmp_path / 'file' / 'native'}" in capsys.readouterr().err


def test_command_line_prints_one_line(scratch, tmp_path):
    output = tmp_path / "native"
    result = run_python(
        *("-m", "gpt2_scratch.export", "--model", str(scratch), "--output", str(output), "--format", "gpt2")
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"wrote {output}: model_type gpt2, GPT2LMHeadModel, 21,432 parameters\n"


def test_run_folder_stands_for_its_model(scratch, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scratch, run / "model")
    (run / "recipe.yaml").write_text("")
    export(run, tmp_path / "of the run", "gpt2")
    export(scratch, tmp_path / "of the model", "gpt2")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("of the run", "of the model")]
    assert weights[0] == weights[1]
