"""A GPT-2 written by hand that Hugging Face's Auto classes know.

Importing this package registers `model_type: gpt2_scratch`, so that `AutoModelForCausalLM.from_pretrained(folder)`
works from then on, and makes every saved folder carry its own code for `trust_remote_code=True`. That needs
`transformers` and torch, and costs their import time of a few seconds.
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
