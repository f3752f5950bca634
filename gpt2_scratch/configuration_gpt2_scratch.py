"""The configuration of a GPT-2.

Needs transformers 5.17 or newer. Field names and defaults are those of the official `gpt2` checkpoints, so their
config.json loads unchanged. Unknown keys, and options that are not implemented here, are errors: ignoring them would
silently compute another model.
"""

import difflib
import fnmatch
import sys
from collections.abc import Iterable
from typing import Any

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(
        f"gpt2_scratch needs transformers 5.17 or newer, found {transformers.__version__}; upgrade it with "
        '"pip install -U transformers", or use the native GPT-2 of this model, which older versions load'
    )

# After the check: older versions lack some of these.
from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import modeling_auto

# Variants of GPT-2's attention in `transformers` that are not implemented here. False is accepted.
_NOT_IMPLEMENTED = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")

# Where the Auto classes find our classes in a saved folder, under `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt2_scratch.GPT2ScratchConfig",
    "AutoModel": "modeling_gpt2_scratch.GPT2ScratchModel",
    "AutoModelForCausalLM": "modeling_gpt2_scratch.GPT2ScratchForCausalLM",
    "AutoModelForSequenceClassification": "heads_gpt2_scratch.GPT2ScratchForSequenceClassification",
    "AutoModelForTokenClassification": "heads_gpt2_scratch.GPT2ScratchForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_gpt2_scratch.GPT2ScratchForQuestionAnswering",
}

# The tables of transformers with the class names of each task, by model type.
_TASK_TABLES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}

# Keys in config.json files of GPT-2, from all versions of `transformers`, that have no effect on this model.
_WITHOUT_EFFECT = {
    *("n_ctx", "n_special", "predict_special_tokens", "output_past", "gradient_checkpointing", "task_specific_params"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("torch_dtype", "attn_implementation", "experts_implementation", "per_layer_config", "quantization_config"),
    *("auto_map", "tokenizer_class", "prefix", "finetuning_task", "is_decoder", "cross_attention_hidden_size"),
    *("pruned_heads", "tie_encoder_decoder", "torchscript", "use_bfloat16", "tf_legacy_loss", "sep_token_id"),
    *("decoder_start_token_id", "transformers_weights", "tie_last_hidden_states", "conversational", "xla_device"),
    "classifier_dropout",  # read by the token classification head only
    *("output_scores", "eos_token_ids", "is_encoder_decoder", "num_labels", "use_return_dict", "loss_type"),
}
# Keys that transformers, Unsloth and programs such as `transformers.js` add.
_NOTES = ("_*", "unsloth_*", "*.js_config")


@strict
class GPT2ScratchConfig(PreTrainedConfig):
    """The configuration of a `GPT2ScratchModel` or `GPT2ScratchForCausalLM`.

    Args:
        vocab_size: number of tokens in the vocabulary.
        n_positions: maximum sequence length; rows of the position embedding.
        n_embd: width of the residual stream.
        n_layer: number of blocks.
        n_head: attention heads per block; head_dim is n_embd / n_head.
        n_inner: hidden width of the MLP; None is 4 * n_embd.
        activation_function: a name from `transformers.activations`; GPT-2 uses the tanh approximation of GELU.
        resid_pdrop: dropout probability of the outputs of attention and MLP.
        embd_pdrop: dropout probability of the summed embeddings.
        attn_pdrop: dropout probability of the attention weights.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        initializer_range: standard deviation of the initial weights.
        scale_attn_weights: divide attention scores by sqrt(head_dim).
        use_cache: return the key-value cache. Pass `use_cache=False` in training.
        bos_token_id: the token that starts a document; GPT-2's end-of-text token.
        eos_token_id: the token or tokens that end generation.
        pad_token_id: the padding token; GPT-2 has none.
        tie_word_embeddings: share the token embedding with `lm_head`.

    Raises:
        ValueError: an unknown key, an option that is not implemented, or sizes that do not fit together.
    """

    model_type = "gpt2_scratch"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - the base class reads a plain list
    attribute_map = {  # noqa: RUF012 - the base class reads a plain dict
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json. PEFT calls this before it looks up our model type."""
        register_model_type()
        return super().to_dict()

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the fields, and refuse unknown keys."""
        for name in _NOT_IMPLEMENTED:
            if kwargs.pop(name, False):
                raise ValueError(f"{name}=True is not implemented here; use transformers.GPT2LMHeadModel")
        # Official files name their own type, which would shadow ours.
        kwargs.pop("model_type", None)
        for name in kwargs:
            if not _is_known(name):
                raise ValueError(
                    f"unknown key {name!r} of {type(self).__name__}{_suggestion(name)}; known are {', '.join(_FIELDS)}"
                )
        super().__post_init__(**kwargs)

        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, found {value}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"expected {name} between 0 and 1, found {value}")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"unknown activation_function {self.activation_function!r}"
                f"{_suggestion(self.activation_function, ACT2FN)}; GPT-2 uses 'gelu_new'"
            )
        if self.n_embd % self.n_head != 0:
            raise ValueError(
                f"n_embd must be a multiple of n_head, found n_embd={self.n_embd} and n_head={self.n_head}; "
                f"try n_embd={-(-self.n_embd // self.n_head) * self.n_head}"
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of config.json. Model type gpt2 becomes ours, without a warning."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == "gpt2":
            config_dict = {**config_dict, "model_type": cls.model_type}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of a config.json, with overrides from `kwargs`, which are checked like the file.

        Other `kwargs` are loading options of the base class.

        Raises:
            ValueError: as in the constructor.
        """
        for name in list(kwargs):
            if name in _FIELDS or name in _NOT_IMPLEMENTED:
                config_dict = {**config_dict, cls.attribute_map.get(name, name): kwargs.pop(name)}
            elif not _is_known(name) and _suggestion(name):
                raise ValueError(f"unknown key {name!r} of {cls.__name__}{_suggestion(name)}")
        return super().from_dict(config_dict, **kwargs)


_FIELDS = [*GPT2ScratchConfig.attribute_map, *GPT2ScratchConfig.__annotations__]
_GENERATION = GenerationConfig().to_dict()


def _is_known(name: str) -> bool:
    """Return whether a key is a field, known to the base class, or without effect."""
    if callable(getattr(PreTrainedConfig, name, None)):
        return False  # a method, which the value would shadow
    return (
        name in _FIELDS
        or name in _WITHOUT_EFFECT
        or name in _NOT_IMPLEMENTED
        or name in _GENERATION
        or any(fnmatch.fnmatchcase(name, pattern) for pattern in _NOTES)
        or hasattr(PreTrainedConfig, name)
        or name in PreTrainedConfig.__dataclass_fields__
    )


def _suggestion(name: str, known: Iterable[str] = _FIELDS) -> str:
    """Return `, did you mean 'X'?` if a known name is close, else an empty string."""
    # Not common.cli_errors: a published folder carries this file, and its code imports nothing outside that folder.
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f", did you mean {closest[0]!r}?" if closest else ""


def register_model_type() -> None:
    """Register our model type with libraries that decide by names of classes or model types.

    Trainer shifts labels under label smoothing, and pipelines accept a model, if its class is in the table of its task.
    PEFT, once imported, has one table of default layers per method; GPT-2's apply.
    """
    for auto_class, table in _TASK_TABLES.items():
        table[GPT2ScratchConfig.model_type] = AUTO_MAP[auto_class].rpartition(".")[2]
    peft = sys.modules.get("peft.utils.constants")
    for table in vars(peft).values() if peft is not None else ():
        if isinstance(table, dict) and "gpt2" in table:
            table.setdefault(GPT2ScratchConfig.model_type, table["gpt2"])


register_model_type()
