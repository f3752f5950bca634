"""A few items of each task in the official raw formats, and a tiny model to evaluate on them."""

import json
import random
from pathlib import Path

import torch

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from support.small_corpora import WORDS

_PLAIN = [word for word in WORDS if word.isascii()]


def write_tasks(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """Write `count` items for HellaSwag, LAMBADA and CBT, and a WikiText."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(rng.choices(_PLAIN, k=words))

    folder.mkdir(parents=True, exist_ok=True)
    hellaswag, lambada, cbt = [], [], []
    for _ in range(count):
        first, second = text(6), text(3)
        hellaswag.append(
            {
                "activity_label": "Reading",
                "ctx_a": first,
                "ctx_b": second,
                "ctx": f"{first} {second}",
                "endings": [text(rng.randint(2, 5)) for _ in range(4)],
                "label": rng.randrange(4),
            }
        )
        lambada.append({"text": text(12)})
        options = [f"{word}{number}" for number, word in enumerate(rng.choices(_PLAIN, k=10))]
        cbt += [f"{number} {text(2)}" for number in range(1, 21)]
        cbt += [f"21 {text(2)} XXXXX {text(2)}\t{rng.choice(options)}\t\t{'|'.join(options)}", ""]
    (folder / "hellaswag_val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hellaswag))
    (folder / "lambada_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lambada))
    for kind in ("CN", "NE"):
        (folder / f"cbtest_{kind}_test_2500ex.txt").write_text("\n".join(cbt) + "\n")
    (folder / "wiki.test.raw").write_text(" \n = Order = \n \n" + "".join(f" {text(40)} \n" for _ in range(count)))
    return folder


def save_model(folder: Path, tokenizer_folder: Path, seed: int = 0, **changes: int) -> Path:
    """Save a random model and the tokenizer in one folder."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ids = {"bos_token_id": 299, "eos_token_id": 299}
    config = GPT2ScratchConfig(**{**sizes, **ids, "initializer_range": 0.2, **changes})
    GPT2ScratchForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return folder
