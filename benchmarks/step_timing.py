"""What the benchmarks of the training step share: models of several projects, one optimizer step, its bound, a clock.

Every side gets the same initialization scale, batch, autocast, gradient clipping and fused AdamW.
"""

import contextlib
import dataclasses
import importlib.util
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from training.optim.optimizer import decay_groups

transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class Geometry:
    """A model, and the batch of one forward pass."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    seq_len: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass."""
        return self.batch_size * self.seq_len

    @property
    def parameters(self) -> int:
        """Parameters of a GPT-2 with as many positions as `seq_len`."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return (self.vocab_size + self.seq_len) * self.n_embd + self.n_layer * block + 2 * self.n_embd

    @property
    def flops_per_token(self) -> float:
        """FLOPs of forward and backward pass, as in training/monitoring/throughput.py."""
        return 6.0 * self.parameters + 12.0 * self.n_layer * self.n_embd * self.seq_len


Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Side:
    """One of the models that are compared: its loss as a function of token ids and shifted targets."""

    name: str
    model: nn.Module
    loss: Loss

    def compiled(self, **options: Any) -> "Side":
        """The same model with a compiled forward pass."""
        return dataclasses.replace(self, name=f"{self.name} compiled", loss=torch.compile(self.loss, **options))


def ours(geometry: Geometry, device: str, attention: str = "sdpa", **config: Any) -> Side:
    """`GPT2ScratchForCausalLM` with the settings of training."""
    settings = _sizes(geometry, GPT2ScratchConfig, activation_function="gelu_pytorch_tanh", **config)
    settings._attn_implementation = attention
    model = GPT2ScratchForCausalLM(settings).to(device).train()
    return Side("ours", model, lambda ids, targets: model(ids, shift_labels=targets, use_cache=False).loss)


def ours_with_logits(geometry: Geometry, device: str, attention: str = "sdpa") -> Side:
    """`GPT2ScratchForCausalLM` with the plain loss over all logits."""
    model = ours(geometry, device, attention).model

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return Side("ours, all logits", model, loss)


def official(geometry: Geometry, device: str, attention: str = "sdpa") -> Side:
    """`transformers.GPT2LMHeadModel`."""
    config = _sizes(geometry, GPT2Config)
    config._attn_implementation = attention
    model = GPT2LMHeadModel(config).to(device).train()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        # `labels` only turns the loss on; `shift_labels` are the targets.
        return model(ids, labels=targets, shift_labels=targets, use_cache=False).loss

    return Side("GPT2LMHeadModel", model, loss)


def nanogpt(geometry: Geometry, device: str, checkout: Path) -> Side:
    """nanoGPT's `GPT` from a checkout, with the vocabulary padded as its configuration advises."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    if spec is None or spec.loader is None or not (checkout / "model.py").is_file():
        raise SystemExit(f"no model.py in {checkout}; pass a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    names = ("n_layer", "n_head", "n_embd")
    config = module.GPTConfig(
        block_size=geometry.seq_len,
        vocab_size=-(-geometry.vocab_size // 64) * 64,
        **{name: getattr(geometry, name) for name in names},
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        model = module.GPT(config).to(device).train()
    return Side("nanoGPT", model, lambda ids, targets: model(ids, targets)[1])


def _sizes(geometry: Geometry, config_class: type, **settings: Any) -> Any:
    sizes = {name: getattr(geometry, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return config_class(n_positions=geometry.seq_len, **sizes, **dropout, **ids, **settings)


class Step:
    """Optimizer steps of one side on random tokens.

    Args:
        side: the model.
        geometry: of the model and the batch.
        device: "cpu" or "cuda".
        bf16: autocast to bf16; otherwise fp32.
        accumulation_steps: forward and backward passes per step; may be changed later.
        fused: fused AdamW; otherwise a loop over the weights.
        optimizer: instead of AdamW.
        keep_gradients: set gradients to zero instead of freeing them: CUDA graphs reuse memory that is not kept.
    """

    def __init__(
        self,
        side: Side,
        geometry: Geometry,
        device: str,
        *,
        bf16: bool,
        accumulation_steps: int = 1,
        fused: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
        keep_gradients: bool = False,
    ) -> None:
        self.name, self._side, self._device, self._bf16 = side.name, side, device, bf16
        self.accumulation_steps = accumulation_steps
        self._parameters = list(side.model.parameters())
        self._keep_gradients = keep_gradients
        if keep_gradients:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer = optimizer or torch.optim.AdamW(
            decay_groups(side.model, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=fused, foreach=False
        )
        ids = torch.randint(geometry.vocab_size, (geometry.batch_size, geometry.seq_len + 1), device=device)
        self._inputs, self._targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def take(self) -> Tensor:
        """Take a step; the loss of its last micro-step."""
        for _ in range(self.accumulation_steps):
            with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
                loss = self._side.loss(self._inputs, self._targets)
            (loss / self.accumulation_steps).backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=not self._keep_gradients)
        return loss.detach()

    def seconds(self, steps: int = 1) -> float:
        """Seconds per step."""
        return seconds(self.take, self._device, steps)


def seconds(action: Callable[[], Any], device: str, times: int = 1) -> float:
    """Seconds per call, with the device synchronized before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        action()
    synchronize(device)
    return (time.perf_counter() - start) / times


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def alternate(actions: Iterable[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Call all actions in turn, `rounds` times; the seconds of each."""
    actions = list(actions)
    results: list[list[float]] = [[] for _ in actions]
    for _ in range(rounds):
        for action, times in zip(actions, results, strict=True):
            times.append(action())
    return results


def bare_products(geometry: Geometry, device: str, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """The matrix products of a step's forward and backward pass without attention's, and their FLOPs.

    No step can be faster: every affine layer and the head need one product forward and two backward. On a GPU the
    vocabulary is padded to a multiple of 64, which is faster.
    """
    columns = geometry.vocab_size if device == "cpu" else -(-geometry.vocab_size // 64) * 64
    tokens, n_embd = geometry.tokens, geometry.n_embd
    layers = [(n_embd, 3 * n_embd), (n_embd, n_embd), (n_embd, 4 * n_embd), (4 * n_embd, n_embd)]
    counts = [(shape, geometry.n_layer) for shape in layers] + [((n_embd, columns), 1)]
    products: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for (n_in, n_out), count in counts:
        inputs = torch.randn(tokens, n_in, device=device, dtype=dtype)
        weight = torch.randn(n_in, n_out, device=device, dtype=dtype)
        outputs = torch.empty(tokens, n_out, device=device, dtype=dtype)
        products.append((inputs, weight, outputs, count))

    def run() -> None:
        for inputs, weight, outputs, count in products:
            for _ in range(count):
                torch.mm(inputs, weight, out=outputs)
                torch.mm(outputs, weight.t(), out=inputs)
                torch.mm(inputs.t(), outputs, out=weight)

    flops = sum(6.0 * tokens * n_in * n_out * count for (n_in, n_out), count in counts)
    return run, flops


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on this machine."""
    size = 8192 if device == "cuda" else 2048
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    times = [seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(7)]
    return 2.0 * size**3 / statistics.median(times[2:])


def machine(device: str) -> str:
    """Device and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}, {versions}"
