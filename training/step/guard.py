"""The guard skips updates that would corrupt the weights: non-finite losses and gradients.

With `skip_spikes`, it also skips loss spikes.

It decides on the device, from the loss and gradient norm over all ranks. So all ranks decide the same, and none waits
for its device. The verdicts are copied to the host asynchronously and read some steps later. The cost per step is one
all-reduce of a scalar and a dozen kernels on `spike_window` numbers.

A loss is a spike if it is more than `spike_threshold` standard deviations above the mean of the last `spike_window`
losses: the rule of OLMo-core's skip-step optimizers and of llm.c. As there, losses of skipped spikes enter the window.
Otherwise a new level of the loss would remain a spike forever.
"""

from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

_DELAY = 4  # steps; a host this far ahead of its device waits for room in the kernel queue anyway


class Verdict(NamedTuple):
    """The guard's findings for one step."""

    step: int  # counted from 1
    loss: float  # mean over all ranks; may be non-finite
    grad_norm: float  # before clipping
    spike: bool
    skipped: bool
    skipped_in_a_row: int  # consecutive skipped updates up to this step, without overflows
    overflowed_scale: float | None = None  # fp16: the loss scale, if it was too large for the gradients


def skip_update_if(flag: Tensor, optimizer: Optimizer) -> None:
    """Make the next `optimizer.step()` a no-op if `flag` (a scalar on the device, 0 or 1) is 1.

    This is the protocol of `torch.amp.GradScaler` with fused optimizers: if `found_inf` is 1, parameters, moments and
    step counters stay bit-identical.

    Raises:
        TypeError: the optimizer does not support `found_inf` and would update the weights.
    """
    optimizer = unwrapped(optimizer)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} cannot skip an update: it does not support found_inf")
    optimizer.found_inf, optimizer.grad_scale = flag, None  # type: ignore[attr-defined]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer in accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class Guard:
    """Checks each step on the device; its verdicts are read later.

    Args:
        device: of the losses.
        threshold: standard deviations above the mean that make a spike; 0 disables spike detection.
        window: number of preceding losses in that mean.
        skip_spikes: whether updates of spikes are skipped too.
        step: steps taken before the first check.
        loss_scale: the state of fp16's loss scaler, which is saved with the guard's. That scaled gradients of a finite
            loss overflow is expected: this is no spike and no skipped update in a row, unless the scale is below 1.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threshold: float,
        window: int,
        skip_spikes: bool,
        step: int = 0,
        loss_scale: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._threshold = threshold
        self._skip_spikes = skip_spikes
        self._on_cuda = device.type == "cuda"
        self._step = step
        self._scale = loss_scale.get("loss_scale/scale", torch.zeros((), device=device))
        self.skipped_in_a_row = 0  # as of the last verdict read
        # What the guard remembers between steps; updated in place and saved in checkpoints. The window is NaN until it
        # is full: the mean is NaN too, and no comparison with it holds.
        self.state = {
            "guard/window": torch.full((window,), torch.nan, device=device),
            "guard/skipped_in_a_row": torch.zeros((), device=device),
            **loss_scale,
        }
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return 1 if the update of the next step must be skipped, else 0; all are scalars on the device.

        The loss is the mean over all ranks. The gradient norm is the one before clipping.
        """
        self._step += 1
        window, skipped_in_a_row = self.state["guard/window"], self.state["guard/skipped_in_a_row"]
        finite = loss.isfinite()
        spike = torch.zeros_like(finite)
        if self._threshold:
            deviation, mean = torch.std_mean(window)
            spike = finite & (loss > mean + self._threshold * deviation)
            window.copy_(torch.where(finite, torch.cat([window[1:], loss[None]]), window))
        skipped = ~(finite & grad_norm.isfinite())
        overflow = finite & skipped & (self._scale >= 1)
        spike &= ~overflow
        if self._skip_spikes:
            skipped = skipped | spike
        skipped_in_a_row.copy_(torch.where(overflow, skipped_in_a_row, (skipped_in_a_row + 1) * skipped))
        overflowed = self._scale * overflow
        self._send(torch.stack([loss, grad_norm, spike.float(), skipped.float(), skipped_in_a_row, overflowed]))
        return skipped.float()

    def _send(self, record: Tensor) -> None:
        """Start copying the record of a step to the host."""
        copied = None
        if self._on_cuda:
            record = torch.empty(record.shape, dtype=record.dtype, pin_memory=True).copy_(record, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((self._step, record, copied))

    def read(self, *, wait: bool = False) -> list[Verdict]:
        """Verdicts of spikes and skipped updates that have not been read yet, the same ones on every rank.

        Verdicts of the last few steps are left for later calls; with `wait`, all are read, which waits for the device.
        """
        verdicts = []
        while len(self._unread) > (0 if wait else _DELAY):
            step, record, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            loss, grad_norm, spike, skipped, in_a_row, scale = record.tolist()
            verdict = Verdict(step, loss, grad_norm, bool(spike), bool(skipped), int(in_a_row), scale or None)
            self.skipped_in_a_row = verdict.skipped_in_a_row
            if verdict.skipped or verdict.spike:
                verdicts.append(verdict)
        return verdicts
