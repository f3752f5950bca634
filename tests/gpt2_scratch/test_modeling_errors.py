"""Wrong inputs and folders, and the errors of the model."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import cache_of, given, one_thread, tiny, tokens  # noqa: F401 - a fixture for all
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.cache_utils import StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchForSequenceClassification, GPT2ScratchModel
from gpt2_scratch.pretrained_gpt2_scratch import ATTENTION_ARGUMENTS, check_arguments

pytestmark = pytest.mark.parity


def test_sequence_longer_than_the_positions_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="sequence of 1,400 tokens exceeds n_positions=48; shorten it"):
        model(tokens(1, 1400))
    with pytest.raises(ValueError, match="sequence of 1,400 tokens"):
        model(inputs_embeds=torch.zeros(1, 1400, 32))
    with pytest.raises(ValueError, match="sequence of 49 tokens"):
        model(tokens(1, 49), position_ids=torch.arange(49).unsqueeze(0))


@pytest.mark.parametrize("static", [False, True])
def test_cache_that_grows_past_the_positions_is_refused(static):
    model = tiny()
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    cache = cache_of(model(tokens(1, 48), **given(cache), use_cache=True))
    with pytest.raises(ValueError, match="sequence of 49 tokens exceeds n_positions=48"):
        model(tokens(1, 1), **given(cache))


def test_packed_documents_may_exceed_n_positions_in_total():
    packed = {"input_ids": tokens(1, 90), "position_ids": torch.arange(90).unsqueeze(0) % 45}
    assert tiny()(**packed, use_cache=False).logits.shape == (1, 90, 97)


def test_exactly_one_kind_of_input_is_accepted():
    model = tiny()
    with pytest.raises(ValueError, match="found neither"):
        model()
    with pytest.raises(ValueError, match="found both"):
        model(tokens(), inputs_embeds=torch.zeros(2, 20, 32))


@pytest.mark.parametrize(
    "argument",
    ["labelz", "past_key_value", "cache_params", "flubber", "sliding_window", "pixel_values"],
)
@pytest.mark.parametrize("value", [torch.ones(2, 20), True, None], ids=["tensor", "flag", "None"])
def test_unknown_arguments_are_refused_by_name(argument, value):
    for model in (tiny(), tiny().transformer):
        with pytest.raises(TypeError, match=f"got an unexpected argument '{argument}'"):
            model(tokens(), **{argument: value})


@pytest.mark.parametrize("argument", ["token_type_ids", "encoder_hidden_states", "encoder_attention_mask"])
def test_unimplemented_arguments_of_the_official_class_are_refused_unless_none(argument):
    model = tiny()
    with pytest.raises(TypeError, match=f"does not implement {argument}; use transformers.GPT2LMHeadModel"):
        model(tokens(), **{argument: tokens()})
    assert torch.equal(model(tokens(), **{argument: None}).logits, model(tokens()).logits)


@pytest.mark.parametrize("argument", ["labels", "num_items_in_batch"])
def test_arguments_of_a_loss_are_refused_by_the_model_without_a_head(argument):
    with pytest.raises(TypeError, match=f"got an unexpected argument '{argument}'"):
        tiny().transformer(tokens(), **{argument: tokens()})


def test_arguments_of_attention_implementations_reach_them():
    received = {}

    def attend(module, query, key, value, attention_mask, **kwargs):
        received.update(kwargs)
        return torch.zeros_like(query).transpose(1, 2), None

    model = tiny()
    ALL_ATTENTION_FUNCTIONS["recording"] = attend
    model.config._attn_implementation = "recording"
    try:
        model(tokens(), **dict.fromkeys(ATTENTION_ARGUMENTS, 7))
    finally:
        del ALL_ATTENTION_FUNCTIONS["recording"]
    assert dict.fromkeys(ATTENTION_ARGUMENTS, 7).items() <= received.items()
    assert received["scaling"] == 8**-0.5
    assert received["dropout"] == 0.0


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_arguments_that_the_attention_implementation_ignores_are_refused_by_name(attn_implementation):
    model = tiny(attn_implementation=attn_implementation)
    ignored = ATTENTION_ARGUMENTS - ({"is_causal"} if attn_implementation == "sdpa" else set())
    for name in ignored:
        message = f"got {name}, which attn_implementation='{attn_implementation}' does not read; leave it out"
        for value in (torch.arange(3), 7, DynamicCache(config=model.config)):
            with pytest.raises(TypeError, match=message):
                model(tokens(), **{name: value})
        assert torch.equal(model(tokens(), **{name: None}).logits, model(tokens()).logits)


@pytest.mark.parametrize("value", [((torch.zeros(1), torch.zeros(1)),), torch.zeros(2), "a cache", False])
def test_what_is_not_a_cache_is_refused_as_one(value):
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with pytest.raises(TypeError, match=f"expected a cache of transformers, .* found {type(value).__name__}"):
        tiny()(ids, past_key_values=value, position_ids=positions)


def test_sdpa_reads_is_causal():
    model = tiny(attn_implementation="sdpa")
    causal, other = (model(tokens(), is_causal=value, use_cache=False).logits for value in (True, False))
    assert torch.equal(causal, model(tokens()).logits)
    assert not torch.allclose(causal, other)


@pytest.mark.parametrize("use_cache", [True, False])
def test_sdpa_cannot_read_is_causal_with_a_mask(use_cache):
    model = tiny(attn_implementation="sdpa")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, 15:] = 0
    with pytest.raises(TypeError, match="got is_causal, which attn_implementation='sdpa' does not read with padding"):
        model(tokens(), attention_mask=mask, is_causal=False, use_cache=use_cache)
    causal = model(tokens(), attention_mask=mask, is_causal=True, use_cache=use_cache).logits
    assert torch.equal(causal, model(tokens(), attention_mask=mask, use_cache=use_cache).logits)


FLASH_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_flash_attention_reads_where_documents_begin_if_that_is_complete(name):
    model = tiny()
    model.config._attn_implementation = name
    complete = dict.fromkeys(FLASH_DOCUMENTS, 7)
    arguments = {**complete, "is_causal": False}
    assert check_arguments(model, arguments, None, None, None) == arguments
    for missing in FLASH_DOCUMENTS:
        partial = {**complete, missing: None}
        with pytest.raises(TypeError, match="does not read; leave it out"):
            check_arguments(model, partial, None, None, None)
    with pytest.raises(TypeError, match="does not read with padding"):
        check_arguments(model, complete, None, None, torch.ones(2, 20))


@pytest.mark.parametrize("argument", sorted(ATTENTION_ARGUMENTS - {*FLASH_DOCUMENTS, "is_causal"}))
def test_flash_attention_refuses_the_arguments_of_others(argument):
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match=f"got {argument}, which attn_implementation='flash_attention_2' does not read"):
        check_arguments(model, {argument: 7}, None, None, None)


@pytest.mark.parametrize("also", [{}, {"shift_labels": tokens()}])
def test_labels_of_positions_without_logits_are_refused(also):
    model = tiny()
    with pytest.raises(
        ValueError, match=r"expected labels of shape \(2, 3\), found \(2, 20\); .* leave logits_to_keep"
    ):
        model(tokens(), labels=tokens(), logits_to_keep=3, **also)
    with pytest.raises(ValueError, match=r"expected labels of shape \(2, 20\), found \(20, 2\)"):
        model(tokens(), labels=tokens().T)
    assert model(tokens(), labels=tokens(), logits_to_keep=20).loss == model(tokens(), labels=tokens()).loss


def test_a_cache_under_the_name_of_another_argument_is_refused():
    def attend(module, query, key, value, attention_mask, **kwargs):
        return torch.zeros_like(query).transpose(1, 2), None

    model = tiny()
    ALL_ATTENTION_FUNCTIONS["reads everything"] = attend
    model.config._attn_implementation = "reads everything"
    try:
        with pytest.raises(TypeError, match="got block_table, which"):
            model(tokens(), block_table=DynamicCache(config=model.config))
    finally:
        del ALL_ATTENTION_FUNCTIONS["reads everything"]


def test_flattened_documents_are_separated_by_their_positions_and_lengths_that_nothing_reads_are_refused():
    model = tiny(attn_implementation="sdpa")
    documents = [{"input_ids": row.tolist()} for row in (tokens(1, 7)[0], tokens(1, 9, seed=2)[0])]
    batch = DataCollatorWithFlattening()(documents, return_tensors="pt")
    packed = model(**batch, use_cache=False).logits
    alone = torch.cat([model(torch.tensor([one["input_ids"]])).logits for one in documents], dim=1)
    torch.testing.assert_close(packed, alone)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents, return_tensors="pt")
    assert torch.equal(model(**batch, use_cache=False).logits, packed)
    with pytest.raises(TypeError, match="got cu_seq_lens_q, which attn_implementation='sdpa' does not read"):
        model(**batch, use_cache=True)


def test_inputs_with_a_wrong_number_of_dimensions_are_refused():
    model = tiny()
    for shape in ((20,), (1, 1, 20)):
        with pytest.raises(ValueError, match=r"expected input_ids of shape \(batch, seq\), found \(.*20.*\)"):
            model(tokens(1).view(shape))
    with pytest.raises(ValueError, match=r"expected inputs_embeds of shape \(batch, seq, n_embd\), found \(20, 32\)"):
        model(inputs_embeds=torch.zeros(20, 32))


@pytest.mark.parametrize("bad", [97, -1, 50256])
def test_ids_outside_the_vocabulary_are_refused(bad):
    model, input_ids = tiny(), tokens()
    input_ids[1, 3] = bad
    with pytest.raises(ValueError, match=f"expected input_ids from 0 to 96, found {bad:,}; check the tokenizer"):
        model(input_ids)
    for labels in ({"labels": input_ids}, {"shift_labels": input_ids}):
        with pytest.raises(ValueError, match=f"expected labels from 0 to 96, found {bad:,}"):
            model(tokens(), **labels)


@pytest.mark.parametrize("bad", [48, -1])
def test_positions_without_an_embedding_are_refused(bad):
    position_ids = torch.arange(20).unsqueeze(0)
    position_ids[0, 5] = bad
    with pytest.raises(ValueError, match=f"expected position_ids from 0 to 47, found {bad}"):
        tiny()(tokens(), position_ids=position_ids)


def test_cache_is_refused_under_activation_checkpointing():
    model = tiny()
    cache = cache_of(model(tokens(), use_cache=True))
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    with pytest.raises(ValueError, match="activation checkpointing in training cannot use a key-value cache"):
        model.train()(tokens(), **given(cache))
    assert cache_of(model.eval()(tokens(1, 1).expand(2, 1), **given(cache))).get_seq_length() == 21


def change_weights(folder, change):
    """Apply `change` to the dictionary of weights of a folder."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_class", [GPT2ScratchForCausalLM, GPT2ScratchModel])
def test_weight_of_another_shape_is_an_error_and_nothing_else_is_logged(tmp_path, model_class, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny().save_pretrained(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    change_weights(tmp_path, lambda weights: weights | {name: torch.zeros(32, 64)})
    with pytest.raises(ValueError, match=r"h.1.mlp.c_fc.weight has shape \(32, 64\) instead of \(32, 128\)"):
        model_class.from_pretrained(tmp_path)
    assert caplog.text == ""
    model_class.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert "LOAD REPORT" in caplog.text


@pytest.mark.parametrize(
    "model_class", [GPT2ScratchForCausalLM, GPT2ScratchModel, GPT2ScratchForSequenceClassification]
)
def test_missing_weights_are_an_error(tmp_path, model_class):
    tiny().save_pretrained(tmp_path)
    missing = {"transformer.ln_f.bias", "transformer.h.2.attn.c_proj.weight"}
    change_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if k not in missing})
    with pytest.raises(
        ValueError, match=r"lacks weights of .*h.2.attn.c_proj.weight, .*ln_f.bias \(2 in total\); use a complete"
    ):
        model_class.from_pretrained(tmp_path)


def test_missing_head_of_an_untied_model_is_an_error(tmp_path):
    tiny(tie_word_embeddings=False).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"lacks weights of GPT2ScratchForCausalLM: lm_head.weight \(1 in total\)"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path)


def test_new_classification_head_is_logged(tmp_path, caplog, monkeypatch):
    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        GPT2ScratchForSequenceClassification.from_pretrained(tmp_path)
    assert {line.split()[0] for line in caplog.text.splitlines() if "| MISSING" in line} == {"score.weight"}


def test_mask_buffers_of_old_checkpoints_are_ignored_silently(tmp_path, caplog, monkeypatch):
    tiny().save_pretrained(tmp_path)
    buffers = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 4, 4) for i in range(3) for name in ("bias", "masked_bias")
    }
    change_weights(tmp_path, lambda weights: weights | buffers)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path)
    assert caplog.text == ""
    change_weights(tmp_path, lambda weights: weights | {"transformer.h.9.attn.c_attn.bias": torch.ones(1)})
    change_weights(tmp_path, lambda weights: weights | {"transformer.h.0.cattn.bias": torch.ones(1)})
    change_weights(tmp_path, lambda weights: weights | {"transformer.h.0.attn.biases": torch.ones(1)})
    with caplog.at_level(logging.WARNING, "transformers"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path)
    # The report merges layer numbers.
    for name in ("c_attn.bias", "cattn.bias", "attn.biases"):
        assert name in caplog.text


def test_pickled_weights_are_read_only_on_request(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model.bin, a pickle"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path)
    loaded = GPT2ScratchForCausalLM.from_pretrained(tmp_path, use_safetensors=False, attn_implementation="eager")
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_pickle_that_would_run_code_is_not_run(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(tmp_path / "exploded")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    assert not (tmp_path / "exploded").exists()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        GPT2ScratchForCausalLM.from_pretrained(tmp_path / "nothing")
