"""A hand-written GPT-2 for Hugging Face's Auto classes.

Importing this package registers `model_type: gpt2_scratch`, so `AutoModelForCausalLM.from_pretrained(folder)` works.
Saved folders also carry their own code, for `trust_remote_code=True`. The import takes
seconds, because it imports transformers and torch.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .linear_cross_entropy import linear_cross_entropy
from .modeling_gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchForSequenceClassification, GPT2ScratchModel
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel

AutoConfig.register(GPT2ScratchConfig.model_type, GPT2ScratchConfig)
AutoModel.register(GPT2ScratchConfig, GPT2ScratchModel)
AutoModelForCausalLM.register(GPT2ScratchConfig, GPT2ScratchForCausalLM)
AutoModelForSequenceClassification.register(GPT2ScratchConfig, GPT2ScratchForSequenceClassification)

GPT2ScratchConfig.register_for_auto_class()
GPT2ScratchModel.register_for_auto_class("AutoModel")
GPT2ScratchForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPT2ScratchForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "GPT2ScratchConfig",
    "GPT2ScratchForCausalLM",
    "GPT2ScratchForSequenceClassification",
    "GPT2ScratchModel",
    "GPT2ScratchPreTrainedModel",
    "linear_cross_entropy",
]
