"""The overhead of the training loop, the time to the first step, and the time that a checkpoint pauses training.

    python benchmarks/loop.py [--part loop|launch|checkpoint] [--chunks 20]

- loop: chunks of steps of `training/loop.py`, with guard, clipping and logging, alternate with chunks of a bare
  forward, backward, optimizer loop over the same batches, already in memory; one process, two models.
- launch: `training/train.py --help`; from `accelerate launch` to the first logged step, over shards that are ready, not
  compiled.
- checkpoint: how long training of 124M parameters pauses for a checkpoint that is written in the background.

Medians; for the loop also the ratio chunk by chunk. The first two parts use the quickstart's model.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.checkpoints.state_snapshot import bare_model
from training.data.loading.loader import TrainingWindows, training_batches
from training.data.producing.producer import produce
from training.data.shards.shard_spec import ShardSpec
from training.loop import train
from training.optim.optimizer import build_optimizer
from training.recipe import QUICKSTART, Recipe, load_recipe
from training.step.hooks import Hook, Run
from training.step.train_step import StepResult

ROOT = Path(__file__).resolve().parent.parent
STEPS_IN_A_CHUNK = 5
WARM_UP_CHUNKS = 2


def shards(folder: Path) -> Recipe:
    """Shards of random words in `folder`, and the quickstart's recipe for them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    corpus = folder / "corpus.txt"
    with corpus.open("w") as file:
        for _ in range(2000):
            file.write(" ".join(rng.choices(words, k=200)) + "\n\n")
    folders = {name: str(folder / name) for name in ("data_dir", "output_dir")}
    lengths = {"shard_tokens": 200_000, "val_tokens": 20_000, "eval_tokens": 8192}
    off = dict.fromkeys(("save_steps", "eval_steps", "sample_steps", "seq_len_warmup_steps"), 0)
    recipe = load_recipe(QUICKSTART, {**folders, "corpus": str(corpus), **lengths, **off})
    spec = ShardSpec(
        folder=Path(recipe.data_dir),
        corpus=recipe.corpus,
        tokenizer=recipe.tokenizer,
        shard_tokens=recipe.shard_tokens,
        val_tokens=recipe.validation_shard_tokens,
    )
    produce(spec, num_workers=0, report=lambda line: None)
    return recipe


def bare_chunk(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]], precision: str
) -> float:
    """Seconds of a chunk of steps: forward, backward and update only."""
    device = next(model.parameters()).device
    start = time.perf_counter()
    for _ in range(STEPS_IN_A_CHUNK):
        inputs, targets = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=inputs.to(device), shift_labels=targets.to(device), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Alternate(Hook):
    """Runs a chunk of the bare loop after each chunk of training, and measures both."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.bare: list[float] = []

    def before_training(self, run: Run) -> None:
        """Copy the model, and load the batches."""
        device = run.accelerator.device
        self.model = copy.deepcopy(bare_model(run.accelerator, run.model)).to(device).train()
        bf16 = run.accelerator.mixed_precision == "bf16"
        self.optimizer = build_optimizer(self.model, run.recipe, dtype=torch.bfloat16 if bf16 else torch.float32)
        windows = TrainingWindows(run.shards, run.tokenizer.vocab_size)
        self.batches = iter(list(training_batches(windows, run.batch, rank=0, first_step=0, end_step=run.total_steps)))
        self.start = time.perf_counter()

    def after_step(self, run: Run, result: StepResult) -> None:
        """Measure a chunk of both loops."""
        if run.step % STEPS_IN_A_CHUNK == 0:
            _synchronize(run.accelerator.device)
            self.ours.append(time.perf_counter() - self.start)
            precision = run.accelerator.mixed_precision
            self.bare.append(bare_chunk(self.model, self.optimizer, self.batches, precision))
            self.start = time.perf_counter()


def loop_against_bare(recipe: Recipe, chunks: int) -> tuple[list[float], list[float]]:
    """Seconds of each chunk of training and of the bare loop, in turn."""
    hook = Alternate()
    with contextlib.redirect_stdout(io.StringIO()):
        train(dataclasses.replace(recipe, max_steps=(chunks + WARM_UP_CHUNKS) * STEPS_IN_A_CHUNK), hooks=[hook])
    return hook.ours[WARM_UP_CHUNKS:], hook.bare[WARM_UP_CHUNKS:]


def launched(recipe: Recipe, path: Path, until: Callable[[str], bool]) -> tuple[float, list[str]]:
    """Start a run as a user does; return the seconds until a line for which `until` holds, and all lines so far."""
    recipe.save(path)
    command = [Path(sys.executable).parent / "accelerate", "launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [ROOT / "training" / "train.py", "--config", path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines: list[str] = []
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if until(line):
                    return time.perf_counter() - start, lines
        finally:  # the launcher and its processes
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    raise SystemExit("the run ended early:\n" + "\n".join(lines))


def seconds_of_help(rounds: int = 3) -> list[float]:
    """Seconds of `training/train.py --help`, per round."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--help"]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return times


def seconds_to_first_step(recipe: Recipe, folder: Path, rounds: int = 3) -> list[float]:
    """Seconds from `accelerate launch` to the log line of the first step, per round."""
    times = []
    for turn in range(rounds):
        first = dataclasses.replace(recipe, output_dir=str(folder / f"launch-{turn}"), logging_steps=1)
        times.append(launched(first, folder / "launch.yaml", lambda line: line.startswith("step 1/"))[0])
    return times


def stalls(recipe: Recipe, folder: Path, checkpoints: int = 3) -> list[float]:
    """Seconds that each of the first checkpoints pauses training of 124M parameters, as logged."""
    large = dataclasses.replace(
        recipe,
        output_dir=str(folder / "large"),
        n_layer=17,  # five more than GPT-2, for its larger vocabulary
        n_head=12,
        n_embd=768,
        n_positions=1024,
        seq_len=128,
        tokens_per_step=256,
        per_device_train_batch_size=2,
        save_steps=10,
        save_total_limit=1,
        async_save=True,
    )
    saved = re.compile(r"checkpoint saved; training paused for ([\d.]+) s")
    seen = 0

    def enough(line: str) -> bool:
        nonlocal seen
        seen += saved.search(line) is not None
        return seen == checkpoints

    _, lines = launched(large, folder / "large.yaml", enough)
    return [float(found[1]) for line in lines if (found := saved.search(line))]


def main() -> None:
    """Print a line per part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["loop", "launch", "checkpoint"], help="run only this part")
    parser.add_argument("--chunks", type=int, default=20, help=f"chunks of {STEPS_IN_A_CHUNK} steps per side")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(
        f"{device}, {os.cpu_count()} cores; torch {torch.__version__}, accelerate {accelerate.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = shards(folder)
        if arguments.part in (None, "launch"):
            times = seconds_of_help()
            print(f"--help: {statistics.median(times):.2f} s, median of {len(times)}")
            times = seconds_to_first_step(recipe, folder)
            print(f"launch to first step: {statistics.median(times):.1f} s, median of {len(times)}")
        if arguments.part in (None, "checkpoint"):
            times = stalls(recipe, folder)
            print(f"a checkpoint of 124M parameters pauses training for {', '.join(f'{t:.2f}' for t in times)} s")
        if arguments.part in (None, "loop"):
            ours, bare = loop_against_bare(recipe, arguments.chunks)
            ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
            a_step = [1e3 * statistics.median(times) / STEPS_IN_A_CHUNK for times in (ours, bare)]
            print(
                f"a step: ours {a_step[0]:.1f} ms, bare {a_step[1]:.1f} ms, ratio {ratio:.3f}; "
                f"medians of {len(ours)} chunks of {STEPS_IN_A_CHUNK} steps in turn"
            )


if __name__ == "__main__":
    main()
