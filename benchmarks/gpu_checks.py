"""What must hold on a device before its speed counts: each check returns a line, or raises `CheckError`."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from loop import ROOT, shards
from step_timing import Geometry, Side, official, ours
from torch import Tensor

from gpt2_scratch import linear_cross_entropy
from training.step.guard import skip_update_if
from training.step.train_step import document_positions

SMALL = Geometry(4, 4, 256, 50_257, 256, 4)
TINY = Geometry(2, 2, 32, 301, 24, 2)


class CheckError(Exception):
    """The device gives wrong values."""


def require(condition: bool, text: str) -> str:
    """Return the text, or raise it as an error."""
    if not condition:
        raise CheckError(text)
    return text


def loss_and_gradients(side: Side, ids: Tensor, *, bf16: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss of one batch and the gradient of every weight, in fp32."""
    side.model.zero_grad(set_to_none=True)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss = side.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    loss.backward()
    gradients = {name: weight.grad.float() for name, weight in side.model.named_parameters() if weight.grad is not None}
    return loss.item(), gradients


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient, by norms."""
    errors = [float((found[name] - value).norm() / (value.norm() + 1e-12)) for name, value in expected.items()]
    return max(errors)


def parity(device: str, *, toy: bool) -> str:
    """Loss and gradients equal those of GPT2LMHeadModel: in fp32 and bf16, eager and compiled."""
    geometry = TINY if toy else SMALL
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        model, reference = ours(geometry, device), official(geometry, device)
        reference.model.load_state_dict(model.model.state_dict())
        ids = torch.randint(geometry.vocab_size, (geometry.batch_size, geometry.seq_len + 1), device=device)
        exact = loss_and_gradients(reference, ids, bf16=False)
        rounding = largest_error(loss_and_gradients(reference, ids, bf16=True)[1], exact[1])
        lines = []
        for side in (model, model.compiled()):
            for bf16 in (False, True):
                loss, gradients = loss_and_gradients(side, ids, bf16=bf16)
                error = largest_error(gradients, exact[1])
                # In bf16 as close to fp32 as the official model is.
                limit = 1.5 * rounding if bf16 else 1e-3
                name = f"{side.name} {'bf16' if bf16 else 'fp32'}"
                close = abs(loss - exact[0]) < (2e-2 if bf16 else 1e-4)
                lines.append(require(close and error <= limit, f"{name}: gradient error {error:.1e} of {limit:.1e}"))
        return "; ".join(lines)
    finally:
        torch.set_float32_matmul_precision(precision)


def chunked_loss(device: str, *, toy: bool) -> str:
    """The chunked loss, smoothed and with z-loss, and its gradients are as close to fp64 as the plain loss."""
    tokens, n_embd, vocab_size = (60, 32, 301) if toy else (4096, 768, 50_257)
    hidden = torch.randn(tokens, n_embd, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(vocab_size, n_embd, device=device)).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device=device)
    targets[::7] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01}

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        squares = logits.logsumexp(-1)[targets != -100].square().mean()
        return F.cross_entropy(logits, targets, label_smoothing=0.1) + 0.01 * squares

    def chunked(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, **options)

    def results(loss: Callable[..., Tensor], *inputs: Tensor, bf16: bool = False) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    exact = results(plain, *(tensor.detach().double().requires_grad_() for tensor in (hidden, weight)))
    lines = []
    for bf16 in (False, True):
        errors = []
        for loss in (chunked, plain):
            found = results(loss, hidden, weight, bf16=bf16)
            errors.append(max(float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)))
        limit = 1.5 * errors[1] + 1e-6
        lines.append(
            require(errors[0] <= limit, f"{'bf16' if bf16 else 'fp32'}: error {errors[0]:.1e}, plain {errors[1]:.1e}")
        )
    return "; ".join(lines)


def document_mask(device: str, *, toy: bool) -> str:
    """Flex attention with a document mask gives the loss and gradients of the dense mask."""
    if device == "cpu":
        return "skipped: flex attention has no backward pass on a CPU"
    geometry = TINY if toy else SMALL
    found = []
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        model = ours(geometry, device, attention).model
        ids = torch.randint(geometry.vocab_size, (geometry.batch_size, geometry.seq_len), device=device)
        ids[:, geometry.seq_len // 3] = ids[:, geometry.seq_len // 2] = 0
        positions = document_positions(ids, 0)
        loss = model(ids, shift_labels=ids.roll(-1, 1), position_ids=positions, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
    error = largest_error(found[1][1], found[0][1])
    return require(error < 2e-2, f"gradient error {error:.1e}, losses {found[0][0]:.4f} and {found[1][0]:.4f}")


def guard(device: str, *, toy: bool) -> str:
    """A skipped update leaves weights and moments as they were; a taken one does not."""
    weight = torch.nn.Parameter(torch.randn(64, 64, device=device))
    optimizer = torch.optim.AdamW([weight], fused=True)
    before = weight.detach().clone()
    for skipped in (1.0, 0.0):
        weight.grad = torch.full_like(weight, float("nan") if skipped else 1.0)
        skip_update_if(torch.tensor(skipped, device=device), optimizer)
        optimizer.step()
        require(torch.equal(weight, before) == bool(skipped), f"found_inf={skipped:.0f} was not obeyed")
    return "a non-finite update is skipped, a finite one taken"


def resume(device: str, *, toy: bool) -> str:
    """A run that stops halfway and resumes ends with the weights of a run that does not, bit for bit."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        recipe = dataclasses.replace(
            shards(folder), warmup_steps=2, save_steps=6, logging_steps=6, lr_scheduler_type="constant"
        )
        if toy:
            recipe = dataclasses.replace(recipe, n_layer=1, n_embd=32, n_head=2, seq_len=32, tokens_per_step=256)

        def weights(label: str, *lengths: int) -> bytes:
            for steps in lengths:
                path = folder / f"{label}-{steps}.yaml"
                dataclasses.replace(recipe, output_dir=str(folder / label), max_steps=steps).save(path)
                command = [sys.executable, ROOT / "training" / "train.py", "--config", path]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
                require(done.returncode == 0, (done.stderr.strip().splitlines() or ["training failed"])[-1])
            return (folder / label / "model" / "model.safetensors").read_bytes()

        straight = weights("straight", 12)
        if straight == weights("halves", 6, 12):
            return "a resumed run ends with the same weights, bit for bit"
        require(straight != weights("again", 12), "a resumed run ends with other weights")
        return "not known: two runs without a stop differ too, this device's kernels are not deterministic"


CHECKS = {
    "parity with GPT2LMHeadModel": parity,
    "chunked loss": chunked_loss,
    "document mask": document_mask,
    "guard": guard,
    "resume": resume,
}
