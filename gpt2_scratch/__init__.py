"""A hand-written GPT-2 for Hugging Face's Auto classes.

Importing this package registers `model_type: gpt2_scratch`, so `AutoModelForCausalLM.from_pretrained(folder)` works.
Saved folders also carry their own code, for `trust_remote_code=True`. The import takes
seconds, because it imports transformers and torch.
"""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m gpt2_scratch.generate` imports this package first: Ctrl-C meanwhile is no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import transformers

from .configuration_gpt2_scratch import AUTO_MAP, GPT2ScratchConfig
from .heads_gpt2_scratch import (
    GPT2ScratchForQuestionAnswering,
    GPT2ScratchForSequenceClassification,
    GPT2ScratchForTokenClassification,
)
from .linear_cross_entropy import linear_cross_entropy
from .modeling_gpt2_scratch import GPT2ScratchForCausalLM, GPT2ScratchModel
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel

__all__ = [
    "GPT2ScratchConfig",
    "GPT2ScratchForCausalLM",
    "GPT2ScratchForQuestionAnswering",
    "GPT2ScratchForSequenceClassification",
    "GPT2ScratchForTokenClassification",
    "GPT2ScratchModel",
    "GPT2ScratchPreTrainedModel",
    "linear_cross_entropy",
]

transformers.AutoConfig.register(GPT2ScratchConfig.model_type, GPT2ScratchConfig)
GPT2ScratchConfig.register_for_auto_class()
for _auto_class, _location in AUTO_MAP.items():
    if _auto_class != "AutoConfig":
        _model_class = globals()[_location.rpartition(".")[2]]
        getattr(transformers, _auto_class).register(GPT2ScratchConfig, _model_class)
        _model_class.register_for_auto_class(_auto_class)
