"""GPT-2 with a head for sequence classification, token classification or question answering.

Weights have the names of the official classes. The forward passes are those that the models of transformers share.
"""

from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .pretrained_gpt2_scratch import GPT2ScratchPreTrainedModel


class GPT2ScratchWithHead(GPT2ScratchPreTrainedModel):
    """The base class of the models here: a GPT-2, to which they add a head."""

    # The losses are means, so that Trainer divides them by the accumulation steps. It would not for native GPT-2, whose
    # heads accept `num_items_in_batch` and ignore it.
    accepts_loss_kwargs = False

    def __init__(self, config: GPT2ScratchConfig) -> None:
        # Not at the top: the other file imports this one, so that every saved folder carries it.
        from .modeling_gpt2_scratch import GPT2ScratchModel

        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2ScratchModel(config)


class GPT2ScratchForSequenceClassification(GPT2ScratchWithHead):
    """GPT-2 with a classification head on the last token of each sequence that is not `pad_token_id`.

    Returns logits (batch, num_labels), and a loss that depends on the kind of labels.
    """

    new_head_prefix = "score."
    forward = GenericForSequenceClassification.forward

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


class GPT2ScratchForTokenClassification(GPT2ScratchWithHead):
    """GPT-2 with a classification head on every token.

    Returns logits (batch, seq, num_labels), and the mean cross-entropy of labels (batch, seq) other than -100.
    """

    new_head_prefix = "classifier."
    forward = GenericForTokenClassification.forward

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.classifier = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()

    @property
    def score(self) -> nn.Module:
        """Return the head under the name that the shared forward pass uses."""
        return self.classifier


class GPT2ScratchForQuestionAnswering(GPT2ScratchWithHead):
    """GPT-2 with a head that scores each token as the start and as the end of an answer.

    Returns start and end logits (batch, seq), and the mean of their cross-entropies.
    """

    new_head_prefix = "qa_outputs."
    forward = GenericForQuestionAnswering.forward

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()
