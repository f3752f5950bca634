"""Everything worth knowing about a GPU in a few minutes: is it right, and how fast is it?

    python benchmarks/gpu.py [--minutes 7] [--output gpu-results] [--nanogpt CHECKOUT]

Correctness comes first: parity with GPT2LMHeadModel in fp32 and bf16, compiled and not, the chunked loss, document
masks, the guard, a resumed run. Meanwhile other processes compile what is measured after these checks: complete
optimizer steps of 0.5M tokens at 124M (and 355M) in all combinations worth knowing. Then follow HellaSwag, generation,
the loop and checkpoints. `results.md` and `results.json` are written after every line, so an interrupted run loses
nothing; what does not fit into the minutes is listed as skipped.
Needs torch, transformers, accelerate, safetensors and tiktoken, no network, and no data.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch.nn.attention import SDPBackend, sdpa_kernel

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_checks import CHECKS
from loop import loop_against_bare, shards, stalls
from step_timing import (
    Geometry,
    Side,
    Step,
    bare_products,
    machine,
    matmul_peak,
    nanogpt,
    official,
    ours,
    ours_with_logits,
    seconds,
)

from evaluation.scoring.scorer import score
from evaluation.tasks.task_types import Item, Request
from training.optim.optimizer import build_optimizer
from training.recipe import Recipe

GPT2 = Geometry(12, 12, 768, 50_257, 1024, 32)
MEDIUM = Geometry(24, 16, 1024, 50_257, 1024, 16)
TOY = Geometry(1, 2, 32, 300, 32, 2)
HELLASWAG_ITEMS = 10_042
TOKENS_PER_STEP = 2**19
CUDA_GRAPHS = "reduce-overhead"
COMPILERS = 4  # processes; the settings they compile must fit in memory together


class Report:
    """Results as they come, in a folder.

    Args:
        folder: for results.md and results.json; created if missing.
        title: first line of results.md.
        minutes: after which no measurement starts.
    """

    def __init__(self, folder: Path, title: str, minutes: float) -> None:
        self._folder, self._title = folder, title
        self._end = time.monotonic() + 60 * minutes
        self._rows: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._write()
        print(title)

    def measure(self, name: str, action: Callable[[], str], *, needs: float) -> None:
        """Add the line that `action` returns, or why there is none.

        Args:
            name: of the measurement.
            action: measures.
            needs: seconds that it is expected to take; it is skipped if fewer are left.
        """
        start = time.monotonic()
        if start + needs > self._end:
            result, state = f"skipped: needs {needs:.0f} s", "skipped"
        else:
            try:
                result, state = action(), "measured"
            except Exception as error:  # one failure must not cost the other results
                text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else " ".join(str(error).split())
                result, state = f"failed: {type(error).__name__}: {text[:300]}", "failed"
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
        taken = round(time.monotonic() - start, 1)
        self._rows.append({"name": name, "state": state, "result": result, "seconds": taken})
        self._write()
        print(f"{name}: {result} ({taken} s)", flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of the measurements that failed."""
        return [row["name"] for row in self._rows if row["state"] == "failed"]

    def _write(self) -> None:
        table = ["| measurement | result | seconds |", "| --- | --- | --- |"]
        table += [f"| {row['name']} | {row['result']} | {row['seconds']} |" for row in self._rows]
        (self._folder / "results.md").write_text("\n".join([f"# {self._title}", "", *table, ""]), encoding="utf-8")
        text = json.dumps({"title": self._title, "rows": self._rows}, indent=1)
        (self._folder / "results.json").write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to take steps.

    Attributes:
        side: a key of `SIDES`.
        micro_batch: sequences of a forward pass.
        needs: seconds that the measurement is expected to take.
        geometry: the model; its batch size does not count.
        compiled: whether the forward pass is compiled.
        mode: of `torch.compile`.
        attention: a key of `BACKENDS`; otherwise torch chooses.
        muon: the optimizer is Muon instead of AdamW.
    """

    side: str
    micro_batch: int
    needs: float = 12
    geometry: Geometry = GPT2
    compiled: bool = True
    mode: str | None = None
    attention: str | None = None
    muon: bool = False

    @property
    def name(self) -> str:
        """Of the measurement."""
        size = f"{self.geometry.parameters / 1e6:.0f}M" if self.geometry.parameters > 1e6 else "toy"
        words = [size, self.side, "compiled" if self.compiled else "eager", self.mode, self.attention]
        words.append("Muon" if self.muon else None)
        return " ".join(filter(None, words)) + f", micro-batch {self.micro_batch}"

    def step(self, device: str, checkout: Path | None) -> Step:
        """The step, with the model on its device."""
        geometry = dataclasses.replace(self.geometry, batch_size=self.micro_batch)
        side = SIDES[self.side](geometry, device, *[checkout] if self.side == "nanoGPT" else [])
        side = side.compiled(mode=self.mode) if self.compiled else side
        bf16 = device == "cuda"
        if not self.muon:
            return Step(side, geometry, device, bf16=bf16, keep_gradients=self.mode == CUDA_GRAPHS)
        recipe = Recipe(output_dir="", data_dir="", corpus="", optimizer="muon", max_steps=1)
        optimizer = build_optimizer(side.model, recipe, dtype=torch.bfloat16 if bf16 else torch.float32)
        return Step(side, geometry, device, bf16=bf16, optimizer=optimizer)

    @contextlib.contextmanager
    def backend(self) -> Iterator[None]:
        """Attention with this backend only."""
        with sdpa_kernel(BACKENDS[self.attention]) if self.attention else contextlib.nullcontext():
            yield


SIDES: dict[str, Callable[..., Side]] = {
    "ours": ours,
    "ours, all logits,": ours_with_logits,
    "GPT2LMHeadModel": official,
    "nanoGPT": nanogpt,
}
BACKENDS = {"cuDNN attention": SDPBackend.CUDNN_ATTENTION, "flash attention": SDPBackend.FLASH_ATTENTION}
# The most important first.
SETTINGS = [
    Setting("ours", 32),
    Setting("GPT2LMHeadModel", 16),
    Setting("nanoGPT", 32),
    Setting("ours", 64),
    Setting("ours", 128),
    Setting("ours", 16),
    Setting("ours", 32, muon=True),
    Setting("ours, all logits,", 32),
    Setting("ours", 32, attention="cuDNN attention"),
    Setting("ours", 32, attention="flash attention"),
    Setting("GPT2LMHeadModel", 32),
    Setting("ours", 16, geometry=MEDIUM),
    Setting("GPT2LMHeadModel", 8, geometry=MEDIUM),
    Setting("ours", 32, compiled=False),
    Setting("GPT2LMHeadModel", 16, compiled=False),
    Setting("ours", 32, needs=90, mode=CUDA_GRAPHS),
    Setting("ours", 32, needs=120, mode="max-autotune-no-cudagraphs"),
]


def compile_once(setting: Setting, checkout: Path | None) -> None:
    """Fill the compiler's cache on disk for a setting; in a process of its own."""
    torch.set_float32_matmul_precision("high")
    inductor_config.compile_threads = max(1, (os.cpu_count() or 1) // COMPILERS)
    with setting.backend():
        setting.step("cuda", checkout).take()
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def full_step(setting: Setting, device: str, checkout: Path | None, tokens_per_step: int) -> str:
    """Tokens per second of complete optimizer steps, TFLOP/s, and peak memory."""
    torch._dynamo.reset()
    tokens = setting.micro_batch * setting.geometry.seq_len
    with setting.backend():
        step = setting.step(device, checkout)
        step.accumulation_steps = 2
        step.seconds()  # compiles
        step.accumulation_steps = max(1, tokens_per_step // tokens)
        times = [step.seconds() for _ in range(3)]
    rate = step.accumulation_steps * tokens / min(times)
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""
    return f"{rate:,.0f} tokens/s, {rate * setting.geometry.flops_per_token / 1e12:.3g} TFLOP/s{memory}"


def toy_settings() -> list[Setting]:
    """One tiny setting of every side."""
    sides = [setting.side for setting in SETTINGS if setting.micro_batch == 32 or setting.side == "GPT2LMHeadModel"]
    plain = [Setting(side, 2, needs=0, geometry=TOY) for side in dict.fromkeys(sides)]
    return [*plain, dataclasses.replace(plain[0], muon=True), dataclasses.replace(plain[0], mode=CUDA_GRAPHS)]


def hellaswag(geometry: Geometry, device: str, bf16: bool, items: int) -> str:
    """Seconds for 10,042 random items of HellaSwag's lengths: 80 tokens of context, four endings of 25."""
    model = ours(geometry, device).model.eval()
    context, ending = (80, 25) if geometry.seq_len > 200 else (12, 5)
    ids = torch.randint(geometry.vocab_size, (items, context + 4 * ending)).tolist()
    made = [
        Item(
            index,
            tuple(
                Request(tuple(row[:context]), tuple(row[context + ending * n : context + ending * (n + 1)]))
                for n in range(4)
            ),
            gold=0,
        )
        for index, row in enumerate(ids)
    ]
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        score(model, made[: items // 4])
        elapsed = seconds(lambda: score(model, made), device)
    return f"{items / elapsed:,.0f} items/s: {HELLASWAG_ITEMS / items * elapsed:.1f} s for {HELLASWAG_ITEMS:,} items"


def generation(geometry: Geometry, device: str, bf16: bool, new_tokens: int) -> str:
    """New tokens per second of `generate` with a cache, ours and the official class's."""
    ids = torch.randint(geometry.vocab_size, (1, 8), device=device)
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def rate(side: Side, count: int) -> float:
        model = side.model.eval()
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        return count / seconds(lambda: model.generate(ids, **settings, **lengths), device)

    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        sides = ours(geometry, device), official(geometry, device)
        for side in sides:
            rate(side, 4)
        rates = [rate(side, new_tokens) for side in sides]
    return f"ours {rates[0]:.0f}, GPT2LMHeadModel {rates[1]:.0f} tokens/s, ratio {rates[0] / rates[1]:.2f}"


def loop_overhead(toy: bool) -> str:
    """The training loop against a bare loop over batches that are in memory."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        recipe = shards(Path(name))
        if toy:
            recipe = dataclasses.replace(recipe, n_layer=1, n_embd=32, n_head=2, seq_len=32, tokens_per_step=256)
        else:
            large = {"n_layer": 12, "n_head": 12, "n_embd": 768, "seq_len": 1024, "tokens_per_step": 2**15}
            recipe = dataclasses.replace(recipe, **large, per_device_train_batch_size=16)
        training, bare = loop_against_bare(recipe, chunks=4)
    return f"{sum(training) / sum(bare) - 1:+.1%}"


def checkpoint_stall() -> str:
    """How long a checkpoint of 124M parameters pauses training."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        times = stalls(shards(Path(name)), Path(name))
    return ", ".join(f"{pause:.2f} s" for pause in times)


def main() -> None:
    """Run all checks and measurements that fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7, help="start no measurement that would end later")
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-results"), help="folder of results.md and results.json"
    )
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; without it this side is skipped")
    parser.add_argument("--toy", action="store_true", help="a tiny model, to try the program without a GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.toy:
        raise SystemExit("no GPU found; add --toy to try the program on the CPU")
    device, toy, checkout = "cuda" if torch.cuda.is_available() else "cpu", arguments.toy, arguments.nanogpt
    bf16 = device == "cuda"
    if bf16:
        torch.set_float32_matmul_precision("high")
    inductor_config.autotune_local_cache = False  # what processes chose while they shared the GPU may be slow
    settings = toy_settings() if toy else SETTINGS
    settings = [setting for setting in settings if checkout or setting.side != "nanoGPT"]
    geometry = settings[0].geometry
    report = Report(arguments.output, machine(device), arguments.minutes)
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as executor:
        # Settings that search for the fastest kernels must be alone on the GPU.
        early = [setting for setting in settings if bf16 and setting.compiled and not setting.mode]
        futures = [executor.submit(compile_once, setting, checkout) for setting in early]
        for name, check in CHECKS.items():
            report.measure(name, lambda check=check: check(device, toy=toy), needs=0 if toy else 20)
        wait(futures)
    dtype = torch.bfloat16 if bf16 else torch.float32

    def bound() -> str:
        products, flops = bare_products(dataclasses.replace(geometry, batch_size=32), device, dtype)
        elapsed = min(seconds(products, device) for _ in range(3))
        rate = 32 * geometry.seq_len / elapsed
        return f"{rate:,.0f} tokens/s, {flops / elapsed / 1e12:.3g} of {matmul_peak(device, dtype) / 1e12:.3g} TFLOP/s"

    report.measure("bare matrix products", bound, needs=5)
    tokens_per_step = 4 * 2 * TOY.seq_len if toy else TOKENS_PER_STEP
    for setting in settings:
        report.measure(
            setting.name,
            lambda setting=setting: full_step(setting, device, checkout, tokens_per_step),
            needs=setting.needs,
        )
    short = {"items": 40} if toy else {"items": 2000}
    report.measure("HellaSwag", lambda: hellaswag(geometry, device, bf16, **short), needs=0 if toy else 25)
    report.measure("generation", lambda: generation(geometry, device, bf16, 12 if toy else 256), needs=0 if toy else 20)
    report.measure("overhead of the loop", lambda: loop_overhead(toy), needs=0 if toy else 40)
    if not toy:
        report.measure("pause for a checkpoint", checkpoint_stall, needs=40)
    if report.failed:
        raise SystemExit(f"failed: {', '.join(report.failed)}")


if __name__ == "__main__":
    main()
