"""nanoGPT's own training loop from a checkout, as a side of learning.py: its model, data order, schedule and AdamW.

It draws windows at random offsets, and on a CPU it trains in fp32, whatever the recipe says. Its final weights are
validated like those of our runs, on the same windows.
"""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchForCausalLM
from gpt2_scratch.foreign_checkpoints import convert
from training.data.loading.loader import validation_batches
from training.data.shards.shard_reader import ShardFolder
from training.monitoring.run_history import METRICS
from training.monitoring.validation import validation_loss
from training.recipe import Recipe
from training.setup.accelerator import build_accelerator, resolve_mixed_precision, uses_gpu
from training.setup.model import compiles

# train.py has no flag for its seed.
_WITH_SEED = """
import runpy, sys, torch
seed, manual_seed = int(sys.argv.pop(1)), torch.manual_seed
torch.manual_seed = lambda _: manual_seed(seed)
runpy.run_path("train.py", run_name="__main__")
"""
_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_LOGGED = re.compile(r"^iter (\d+): loss (\S+), time (\S+)ms", re.MULTILINE)


def train_with_nanogpt(recipe: Recipe, checkout: Path) -> None:
    """Train on a recipe's shards with its sizes and settings of AdamW, and write metrics.jsonl as a run of ours does.

    Raises:
        InputError: there is no nanoGPT in the checkout, it failed, or the token ids do not fit its 16 bits.
    """
    if not (checkout / "train.py").is_file():
        raise InputError(f"no train.py in {checkout}; pass a checkout of nanoGPT as --nanogpt")
    shards = ShardFolder.open(recipe.data_dir)
    vocab_size = shards.load_tokenizer(recipe.tokenizer).vocab_size
    if vocab_size > 2**16:
        raise InputError(f"{recipe.data_dir} has {vocab_size:,} token ids, but nanoGPT stores ids in 16 bits")
    output = Path(recipe.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    recipe.save(output / "recipe.yaml")
    with TemporaryDirectory(dir=output) as temporary:
        folder = Path(temporary).resolve()
        for name, files in (("train", shards.train_shards), ("val", [shards.val_shard])):
            with (folder / f"{name}.bin").open("wb") as file:
                for shard in files:
                    file.write(shard.read().astype(np.uint16).tobytes())
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
        log = _run(recipe, checkout, folder)
        (folder / "model").mkdir()
        convert(folder / "ckpt.pt", folder / "model", "none")
        model = GPT2ScratchForCausalLM.from_pretrained(folder / "model")
    lines = [
        {
            "step": int(iteration) + 1,
            "tokens": (int(iteration) + 1) * recipe.tokens_per_step,
            "train_loss": float(loss),
            "tokens_per_second": 1e3 * recipe.tokens_per_step / float(milliseconds),
        }
        for iteration, loss, milliseconds in _LOGGED.findall(log)
        if int(iteration) < (recipe.max_steps or 0)  # it takes one more step after its checkpoint
    ]
    lines.append({"step": recipe.max_steps, "val_loss": _validation_loss(recipe, model, shards, vocab_size)})
    (output / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _run(recipe: Recipe, checkout: Path, folder: Path) -> str:
    """Run train.py, which writes its checkpoint to `folder`; return what it printed."""
    device = "cuda" if uses_gpu() and torch.cuda.is_available() else "cpu"
    micro_batch = recipe.per_device_train_batch_size
    assert isinstance(micro_batch, int)
    settings = {
        "dataset": str(folder),
        "out_dir": str(folder),
        "eval_interval": recipe.max_steps,  # when it also writes its checkpoint
        "eval_iters": 1,
        "log_interval": recipe.logging_steps,
        "gradient_accumulation_steps": recipe.tokens_per_step // (micro_batch * recipe.seq_len),
        "batch_size": micro_batch,
        "block_size": recipe.seq_len,
        "n_layer": recipe.n_layer,
        "n_head": recipe.n_head,
        "n_embd": recipe.n_embd,
        "bias": True,
        "learning_rate": recipe.learning_rate,
        "min_lr": recipe.learning_rate * recipe.min_learning_rate_ratio,
        "beta1": recipe.adam_beta1,
        "beta2": recipe.adam_beta2,
        "weight_decay": recipe.weight_decay,
        "warmup_iters": recipe.warmup_steps,
        "lr_decay_iters": recipe.max_steps,
        "max_iters": recipe.max_steps,
        "device": device,
        "dtype": _DTYPES[resolve_mixed_precision(recipe)],
        "compile": compiles(recipe, device),
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-c", _WITH_SEED, str(recipe.seed), *flags]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise InputError(f"nanoGPT in {checkout} failed: {reason}")
    return done.stdout


def _validation_loss(recipe: Recipe, model: GPT2ScratchForCausalLM, shards: ShardFolder, vocab_size: int) -> float:
    micro_batch = recipe.per_device_train_batch_size
    assert isinstance(micro_batch, int)
    accelerator = build_accelerator(recipe)
    batches = validation_batches(
        shards.val_shard,
        seq_len=recipe.seq_len,
        eval_tokens=recipe.eval_tokens,
        batch_size=micro_batch,
        vocab_size=vocab_size,
        rank=0,
        num_processes=1,
    )
    return validation_loss(accelerator, model.to(accelerator.device), batches)[0]
