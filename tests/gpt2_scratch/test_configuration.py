import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GPT2Config

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM

# config.json of openai-community/gpt2 on the Hub.
OFFICIAL_CONFIG = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_official_sizes_have_the_published_number_of_parameters(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT2ScratchForCausalLM(GPT2ScratchConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_parameters() == parameters


def test_defaults_are_those_of_the_official_configuration():
    official, ours = GPT2Config().to_dict(), GPT2ScratchConfig().to_dict()
    assert {k: v for k, v in ours.items() if k != "model_type"}.items() <= official.items()


def test_hugging_face_names_are_understood():
    config = GPT2ScratchConfig(hidden_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (96, 3, 4, 64)
    assert config.hidden_size == 96


def test_official_config_json_loads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
    config = GPT2ScratchConfig.from_pretrained(tmp_path)
    assert config.model_type == "gpt2_scratch"
    assert (config.n_layer, config.n_embd, config.vocab_size) == (12, 768, 50257)


def test_config_of_the_installed_official_class_loads():
    config = GPT2ScratchConfig.from_dict(GPT2Config(n_layer=3, pad_token_id=7).to_dict())
    assert (config.n_layer, config.pad_token_id, config.to_dict()["model_type"]) == (3, 7, "gpt2_scratch")


def test_values_of_the_base_class_survive_saving(tmp_path):
    config = GPT2ScratchConfig(
        n_layer=2,
        dtype="bfloat16",
        id2label={0: "no", 1: "yes", 2: "maybe"},
        label2id={"no": 0, "yes": 1, "maybe": 2},
        architectures=["GPT2ScratchForCausalLM"],
        attn_implementation="eager",
        output_hidden_states=True,
        auto_map={"AutoConfig": "configuration_gpt2_scratch.GPT2ScratchConfig"},
    )
    config.save_pretrained(tmp_path)
    loaded = GPT2ScratchConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.dtype == torch.bfloat16
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["n_layers", "n_embed", "drop_out", "attention_dropout", "modeltype"])
def test_unknown_keyword_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown key '{name}'"):
        GPT2ScratchConfig(**{name: 1})


def test_error_for_a_typo_suggests_the_closest_field():
    with pytest.raises(ValueError, match="did you mean 'n_layer'"):
        GPT2ScratchConfig(n_layers=3)
    with pytest.raises(ValueError, match="did you mean 'n_layer'"):
        GPT2ScratchConfig.from_dict({"n_layers": 3})


@pytest.mark.parametrize("note", ["transformers.js_config", "unsloth_version", "_commit_of_mine"])
def test_key_that_another_program_added_is_kept(note):
    assert GPT2ScratchConfig.from_dict({"n_layer": 2, note: {"dtype": "q8"}}).to_dict()[note] == {"dtype": "q8"}


@pytest.mark.parametrize("name", ["rotary_dim", "attention_layers", "to_dict", "from_pretrained", "__class__"])
def test_unknown_keys_and_names_of_methods_are_refused_in_code_and_in_files(name, tmp_path):
    with pytest.raises(ValueError, match=f"unknown key '{name}'"):
        GPT2ScratchConfig(**{name: 1})
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_CONFIG | {name: 1}))
    for load in (
        GPT2ScratchConfig.from_pretrained,
        lambda path: GPT2ScratchConfig.from_json_file(path / "config.json"),
    ):
        with pytest.raises(ValueError, match=f"unknown key '{name}'"):
            load(tmp_path)


# Keys that config.json of the larger official models has in addition to that of gpt2, and keys that `transformers` 2 to
# 4 wrote into every file.
LARGER = {
    "gpt2-medium": {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True},
    "gpt2-large": {"n_embd": 1280, "n_head": 20, "n_layer": 36},
    "gpt2-xl": {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True},
}
OF_VERSION = {
    2: {
        **{"do_sample": False, "eos_token_ids": 0, "finetuning_task": None, "id2label": {"0": "LABEL_0"}},
        **{"is_decoder": False, "label2id": {"LABEL_0": 0}, "length_penalty": 1.0, "max_length": 20, "num_beams": 1},
        **{"num_labels": 1, "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False},
        **{"output_past": True, "pruned_heads": {}, "repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50},
        **{"top_p": 1.0, "torchscript": False, "use_bfloat16": False, "pad_token_id": 0},
    },
    3: {"_num_labels": 1, "xla_device": None, "gradient_checkpointing": False, "bad_words_ids": None},
    4: {
        **{"_name_or_path": "gpt2", "chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "early_stopping": False},
        **{"encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None, "forced_bos_token_id": None},
        **{"is_encoder_decoder": False, "min_length": 0, "num_beam_groups": 1, "prefix": None, "problem_type": None},
        **{"remove_invalid_values": False, "return_dict": True, "return_dict_in_generate": False, "typical_p": 1.0},
        **{"sep_token_id": None, "suppress_tokens": None, "task_specific_params": None, "tf_legacy_loss": False},
        **{"tie_encoder_decoder": False, "torch_dtype": "float32", "transformers_version": "4.41.2"},
        **{"begin_suppress_tokens": None, "cross_attention_hidden_size": None, "tokenizer_class": None},
        **{"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False, "add_cross_attention": False},
    },
}


@pytest.mark.parametrize("version", OF_VERSION)
@pytest.mark.parametrize("size", LARGER)
def test_official_files_of_every_size_and_version_load(size, version, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_CONFIG | LARGER[size] | OF_VERSION[version]))
    config = GPT2ScratchConfig.from_pretrained(tmp_path)
    assert config.n_embd == LARGER[size]["n_embd"]


def test_error_for_an_unknown_activation_suggests_the_closest():
    with pytest.raises(ValueError, match="unknown activation_function 'gelu_nwe', did you mean 'gelu_new'"):
        GPT2ScratchConfig(activation_function="gelu_nwe")


@pytest.mark.parametrize("flag", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"])
def test_unimplemented_option_is_refused_and_false_is_accepted(flag):
    with pytest.raises(ValueError, match=f"{flag}=True is not implemented"):
        GPT2ScratchConfig(**{flag: True})
    assert not hasattr(GPT2ScratchConfig(**{flag: False}), flag)


def test_width_that_is_no_multiple_of_the_heads_is_refused():
    with pytest.raises(ValueError, match=r"n_embd=100 and n_head=12; try n_embd=108"):
        GPT2ScratchConfig(n_embd=100, n_head=12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_layer", 0), ("vocab_size", -1), ("n_positions", 0), ("resid_pdrop", 1.5), ("attn_pdrop", -1)],
)
def test_value_outside_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"expected {name} .*found {value}"):
        GPT2ScratchConfig(**{name: value})


@pytest.fixture
def folder(tmp_path):
    GPT2ScratchConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("load", [GPT2ScratchConfig.from_pretrained, AutoConfig.from_pretrained])
def test_overrides_of_a_file_are_used_and_checked(folder, load):
    config = load(folder, n_layer=3, hidden_size=64, resid_pdrop=0, id2label={0: "a", 1: "b", 2: "c"})
    assert (config.n_layer, config.n_embd, config.resid_pdrop, config.num_labels) == (3, 64, 0, 3)
    for name in ("n_head", "num_attention_heads"):
        with pytest.raises(ValueError, match="n_embd=32 and n_head=5"):
            load(folder, **{name: 5})
    with pytest.raises(ValueError, match="reorder_and_upcast_attn=True is not implemented"):
        load(folder, reorder_and_upcast_attn=True)
    with pytest.raises(ValueError, match="unknown key 'n_layers' of GPT2ScratchConfig, did you mean 'n_layer'"):
        load(folder, n_layers=3)
    with pytest.raises(StrictDataclassError, match="expected int, got str"):
        load(folder, n_layer="3")


def test_loading_options_do_not_become_config_keys(folder):
    config, unused = GPT2ScratchConfig.from_pretrained(folder, n_layer=1, device_map="auto", return_unused_kwargs=True)
    assert config.n_layer == 1
    assert unused == {"device_map": "auto"}
    assert not hasattr(config, "device_map")


def test_overrides_passed_to_a_model_are_used_and_checked(folder):
    GPT2ScratchForCausalLM(GPT2ScratchConfig.from_pretrained(folder)).save_pretrained(folder)
    model = GPT2ScratchForCausalLM.from_pretrained(folder, attn_pdrop=0.5, attn_implementation="eager")
    assert model.config.attn_pdrop == model.transformer.h[0].attn.config.attn_pdrop == 0.5
    with pytest.raises(ValueError, match="n_embd=32 and n_head=5"):
        GPT2ScratchForCausalLM.from_pretrained(folder, n_head=5)
    with pytest.raises(ValueError, match="did you mean 'n_layer'"):
        GPT2ScratchForCausalLM.from_pretrained(folder, n_layers=3)
