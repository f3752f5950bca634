"""A model whose probabilities are known: each character depends on the one before it only."""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCABULARY = 128
NEXT = math.log(0.5)  # of the next character in ASCII; after "~" of a space
OTHER = math.log(0.5 / 127)  # of each other character


def following(code: int) -> int:
    """The most likely character after `code`."""
    return ord(" ") if code == ord("~") else (code + 1) % VOCABULARY


def log_probability(before: str, text: str) -> float:
    """log p of `text` after the character `before`."""
    pairs = zip(before + text, text, strict=False)
    return sum(NEXT if ord(b) == following(ord(a)) else OTHER for a, b in pairs)


class Characters:
    """An encoder whose ids are ASCII codes; 0 is the end-of-text token."""

    end_of_text_id = 0
    bos_ids = ()

    def encode(self, text):
        return list(text.encode("ascii"))

    def decode(self, ids):
        return bytes(ids).decode("ascii")

    def decode_bytes(self, ids):
        return bytes(ids)


class AlphabetConfig(PreTrainedConfig):
    model_type = "alphabet"


class Alphabet(PreTrainedModel, GenerationMixin):
    """p(next character of ASCII) = 1/2, p(any other) = 1/254."""

    config_class = AlphabetConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.head = nn.Identity()
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.head(self.table(input_ids)))


def alphabet(n_positions=1024):
    config = AlphabetConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=n_positions,
        eos_token_id=0,
        tie_word_embeddings=False,
        num_hidden_layers=1,
    )
    model = Alphabet(config).eval()
    with torch.no_grad():
        model.table.weight.fill_(OTHER)
        for code in range(VOCABULARY):
            model.table.weight[code, following(code)] = NEXT
    return model
