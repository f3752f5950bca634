"""A model folder like that of a finished run, and the export command."""

import json

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import GPT2Tokenizer

from common.cli_errors import run_command
from gpt2_scratch import (
    GPT2ScratchConfig,
    GPT2ScratchForCausalLM,
)
from gpt2_scratch.export import main

END = "<|endoftext|>"
SIZES = {
    "vocab_size": 257,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
# Texts that tokenizers disagree on: spaces, contractions, digits, several scripts, special tokens, control characters.
TRICKY = [
    "  two  spaces\t\ttabs\n\n\nlines  ",
    "don't DON'T it's we'll 3.14 x² ½",
    "naïve café — “quotes” … \u00a0\u2003",
    "日本語 テキスト שלום مرحبا 👩‍👩‍👧 e\u0301",
    "a<|endoftext|>b <|endoftext|> c",
    "\r\nwin\r\n\x00\x01",
    "",
]
CARD = """---
license: mit
tags:
- gpt2
- gpt2_scratch
---

# tiny

```python
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

With the `gpt2-scratch` package installed, `import gpt2_scratch` takes the place of `trust_remote_code=True`.

- `python -m gpt2_scratch.export --model "path/to/this/folder" --output native --format gpt2`: plain GPT-2
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A model folder like that of a finished run: weights, code, tokenizer, generation config, card, image."""
    path = tmp_path_factory.mktemp("export") / "model"
    save(GPT2ScratchForCausalLM, path)
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = GPT2Tokenizer(vocab=vocabulary | {END: 256}, merges=[], bos_token=END, eos_token=END)
    tokenizer.save_pretrained(path)
    generation = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(generation | {"temperature": 0.7, "do_sample": True}))
    (path / "README.md").write_text(CARD)
    (path / "curves.png").write_bytes(b"picture")
    (path / "training_state").mkdir()
    (path / "training_state" / "optimizer.safetensors").write_bytes(b"moments")
    return path


def save(model_class, path, save_options=None, **overrides):
    torch.manual_seed(0)
    model = model_class(GPT2ScratchConfig(**SIZES | overrides)).eval()
    model.save_pretrained(path, **save_options or {})
    return model


def export(source, output, model_format, *flags):
    main(["--model", str(source), "--output", str(output), "--format", model_format, *flags])


def refusal(capsys, source, output, model_format="gpt2", *flags):
    """Return the error message of an export, which must leave nothing on disk."""
    before = sorted(output.parent.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: export(source, output, model_format, *flags))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert sorted(output.parent.iterdir()) == before
    return captured.err


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def change_config(folder, **changes):
    change_json(folder / "config.json", **changes)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True) + "\n")
