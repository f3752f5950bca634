"""GGUF files, read back with the gguf package and with transformers, whose reader is independent of our writer."""

import json
import shutil
import struct
import sys

import pytest
import torch
from support.model_folders import (  # noqa: F401 - a fixture
    END,
    SIZES,
    TRICKY,
    change_config,
    change_json,
    export,
    refusal,
    save,
    scratch,
)
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchForSequenceClassification

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

# Old releases of the reader copy read-only arrays.
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning"),
]


def model_folder(scratch, path, **overrides):
    """Save a model beside the tokenizer of `scratch`, and return it."""
    model = save(GPT2ScratchForCausalLM, path, initializer_range=0.2, **overrides)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(scratch / name, path / name)
    return model


def load_gguf(path, model):
    # transformers does not read the context length and the width of the MLP from the file.
    config = model.config.to_dict()
    kept = {name: config[name] for name in (*SIZES, "n_inner", "tie_word_embeddings")}
    return GPT2LMHeadModel.from_pretrained(
        path.parent, gguf_file=path.name, config=GPT2Config(**kept), dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(
    "overrides",
    [{}, {"n_embd": 64, "n_head": 4, "n_inner": 96, "tie_word_embeddings": False}],
    ids=["tied", "untied, other n_inner"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 0), ("f32", 0), ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.2)])
def test_file_gives_our_logits_to_the_precision_of_its_dtype(scratch, tmp_path, dtype, tolerance, overrides):
    model = model_folder(scratch, tmp_path / "model", **overrides)
    export(tmp_path / "model", tmp_path / "m.gguf", "gguf", *(("--dtype", dtype) if dtype else ()))
    input_ids = torch.arange(20).view(1, 20)
    expected, found = model(input_ids).logits, load_gguf(tmp_path / "m.gguf", model)(input_ids).logits
    if tolerance == 0:
        assert torch.equal(found, expected)
    else:
        difference = (found - expected).abs().max()
        assert 0 < difference < tolerance * expected.std()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_default_dtype_is_that_of_the_weights(scratch, tmp_path, dtype, capsys):
    export(scratch, tmp_path / "half", "gpt2_scratch", "--dtype", dtype)
    export(tmp_path / "half", tmp_path / "m.gguf", "gguf")
    name = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert capsys.readouterr().out.endswith(f"m.gguf: GGUF, GPT2LMHeadModel, 21,432 parameters, weights in {name}\n")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types.pop("position_embd.weight") == "F32"
    assert {types.pop(one) for one in list(types) if one.endswith(".bias") or "norm" in one} == {"F32"}
    assert set(types.values()) == {name.upper()}


def test_rows_that_do_not_divide_into_blocks_are_f16_and_counted(scratch, tmp_path, capsys):
    export(scratch, tmp_path / "m.gguf", "gguf", "--dtype", "q8_0")  # n_embd is 24; 4 * n_embd is 96
    assert capsys.readouterr().out.endswith("weights in q8_0, 7 in f16 (rows not divisible by 32)\n")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {name for name, kind in types.items() if kind == "Q8_0"} == {f"blk.{i}.ffn_down.weight" for i in range(2)}


def test_file_contains_sizes_and_the_tokenizer(scratch, tmp_path):
    model_folder(scratch, tmp_path / "model", vocab_size=260, n_inner=40, pad_token_id=256)
    export(tmp_path / "model", tmp_path / "my-model.gguf", "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "my-model.gguf").fields.items()}
    expected = {
        "general.architecture": "gpt2",
        "general.name": "my-model",
        "general.file_type": 0,
        "gpt2.context_length": 32,
        "gpt2.embedding_length": 24,
        "gpt2.block_count": 2,
        "gpt2.feed_forward_length": 40,
        "gpt2.attention.head_count": 3,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.padding_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["tokenizer.ggml.tokens"][-4:] == [END, "[PAD257]", "[PAD258]", "[PAD259]"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds == [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * 3


def test_tokenizer_of_the_file_gives_our_ids(scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / "model")
    data = json.loads((scratch / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a")]
    vocab |= {left + right: 257 + i for i, (left, right) in enumerate(merges)}
    data["model"]["merges"] = [list(merge) for merge in merges]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(data))
    save(GPT2ScratchForCausalLM, tmp_path / "model", vocab_size=260)
    export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert len(ours("the a").input_ids) == 2
    for text in ("the a theory", *TRICKY):
        assert theirs(text).input_ids == ours(text).input_ids


def test_vocabulary_of_more_than_65535_tokens_is_kept(scratch, tmp_path):
    model = model_folder(scratch, tmp_path / "model", vocab_size=70_000)
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"t{i}": i for i in range(257, 70_000)}
    path.write_text(json.dumps(tokenizer))
    export(tmp_path / "model", tmp_path / "m.gguf", "gguf", "--dtype", "f32")
    # Not with GGUFReader, which takes many seconds for as many tokens.
    content = (tmp_path / "m.gguf").read_bytes()
    of_strings = struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, 70_000)
    assert b"tokenizer.ggml.tokens" + of_strings in content
    assert struct.pack("<Q", 6) + b"t69999" in content
    assert model.transformer.wte.weight.detach().numpy().tobytes() in content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "gelu"}, "llama.cpp computes GPT-2 with activation_function gelu_new, not gelu, and"),
        ({"scale_attn_weights": False}, "llama.cpp always scales attention scores"),
        ({"vocab_size": 200}, "has the id 256, but config.json says vocab_size=200"),
    ],
)
def test_model_that_llama_cpp_would_compute_differently_is_refused(scratch, tmp_path, capsys, changes, message):
    model_folder(scratch, tmp_path / "model", **changes)
    assert message in refusal(capsys, tmp_path / "model", tmp_path / "m.gguf", "gguf")


@pytest.mark.parametrize("end", [None, [], 257, [300]])
def test_model_without_an_end_of_text_token_is_refused_because_llama_cpp_would_take_another(
    scratch, tmp_path, capsys, end
):
    shutil.copytree(scratch, tmp_path / "model")
    change_config(tmp_path / "model", eos_token_id=end)
    message = refusal(capsys, tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert f"config.json has eos_token_id {end}, which is not a token of the model; llama.cpp would" in message


def test_special_tokens_outside_the_vocabulary_are_not_written(scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / "model")
    change_config(tmp_path / "model", bos_token_id=300, eos_token_id=[300, 256], pad_token_id=300)
    export(tmp_path / "model", tmp_path / "m.gguf", "gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 256
    assert "tokenizer.ggml.padding_token_id" not in fields


def test_classifier_is_refused(tmp_path, capsys):
    save(GPT2ScratchForSequenceClassification, tmp_path / "model")
    message = refusal(capsys, tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert "holds language models, not a GPT2ScratchForSequenceClassification; use --format gpt2" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer.json in"),
        ("{", "is not a valid tokenizer"),
        ('{"model": {"type": "Unigram"}}', "is not a byte-level BPE with GPT-2's pre-tokenization"),
        ('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}', "is not a valid tokenizer"),
    ],
)
def test_missing_or_other_tokenizer_is_refused(scratch, tmp_path, capsys, content, message):
    model_folder(scratch, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert message in refusal(capsys, tmp_path / "model", tmp_path / "m.gguf", "gguf")


TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"<s>": {}}}


@pytest.mark.parametrize(
    "post_processor",
    [
        TEMPLATE,
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]},
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
    ],
    ids=["template", "sequence", "roberta"],
)
def test_tokenizer_that_adds_tokens_to_the_text_is_refused(scratch, tmp_path, capsys, post_processor):
    model_folder(scratch, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": post_processor}))
    message = refusal(capsys, tmp_path / "model", tmp_path / "m.gguf", "gguf")
    assert "adds special tokens to every text, which llama.cpp would not do; use --format gpt2" in message


def test_weight_too_large_for_f16_is_refused(scratch, tmp_path, capsys):
    model = model_folder(scratch, tmp_path / "model")
    model.transformer.wte.weight.data[3, 4] = 1e6
    model.save_pretrained(tmp_path / "model")
    message = refusal(capsys, tmp_path / "model", tmp_path / "m.gguf", "gguf", "--dtype", "f16")
    assert "wte.weight holds 1e+06, too large for f16; use --dtype bf16" in message


@pytest.mark.parametrize(
    ("output", "model_format", "dtype", "message"),
    [
        ("m.bin", "gguf", "f16", "must be a name that ends in .gguf"),
        ("m.gguf", "gguf", "float16", "does not support --dtype float16; choose from f32, f16, bf16, q8_0"),
        ("native", "gpt2", "q8_0", "does not support --dtype q8_0; choose from bfloat16, float16, float32"),
    ],
)
def test_output_and_dtype_must_fit_the_format(scratch, tmp_path, capsys, output, model_format, dtype, message):
    assert message in refusal(capsys, scratch, tmp_path / output, model_format, "--dtype", dtype)


def test_missing_package_is_named_with_the_command_that_installs_it(scratch, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refusal(capsys, scratch, tmp_path / "m.gguf", "gguf")
    assert "--format gguf needs the package gguf: pip install -c constraints.txt -e '.[gguf]'" in message
