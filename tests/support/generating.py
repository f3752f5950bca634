"""A model of random weights, and the command line that generates with it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
)
from gpt2_scratch.generate import main
from support.command_lines import refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model of random weights with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("generate") / "model"
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(path)
    torch.manual_seed(0)
    config = GPT2ScratchConfig(
        vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    GPT2ScratchForCausalLM(config).save_pretrained(path)
    return path


def generate(capfdbinary, *arguments):
    """Return what a command line prints, as bytes, because random weights do not generate valid UTF-8."""
    main([str(argument) for argument in ("--device", "cpu", *arguments)])
    captured = capfdbinary.readouterr()
    return captured.out, captured.err.decode()


def refusal(capsys, *arguments):
    return refused(main, capsys, *arguments)
