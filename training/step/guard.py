"""The guard: an update that would spoil the weights is not made, and a run that cannot go on is stopped.

Whether an update is made is decided on the device, from the loss and the gradient's norm over all processes, so that
all of them decide alike and none waits for its device. The verdicts are copied to the host behind the steps and read
some steps later, when they have long arrived. What it costs: one all-reduce of a scalar a step, and a dozen kernels
on `spike_window` numbers.

A loss is a spike when it lies more than `spike_threshold` standard deviations above the mean of the last `spike_window`
losses, once there are so many: the rule of OLMo-core's skip-step optimizers and of llm.c. Losses of skipped spikes
count there too, as they do with those two: otherwise a new level of the loss would be a spike for ever.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

_LOOK_BACK = 4  # steps; a host that far ahead of its device waits for room in the queue of kernels anyway


class Verdict(NamedTuple):
    """What the guard found in one step.

    Attributes:
        step: counted from 1, as in the logs.
        loss: mean over all processes; may be no finite number.
        grad_norm: before clipping.
        spike: whether the loss stood out of those before it.
        skipped: whether the update was left out.
        in_a_row: updates that were left out one after the other, up to this one.
    """

    step: int
    loss: float
    grad_norm: float
    spike: bool
    skipped: bool
    in_a_row: int


def skip_update_if(flag: Tensor, optimizer: Optimizer) -> None:
    """Make the next `step()` of `optimizer` do nothing if `flag` (a scalar on the device, 0 or 1) is 1.

    This is what `torch.amp.GradScaler` asks of torch's fused optimizers: where `found_inf` is 1, parameters, moments
    and step counters stay as they are, bit for bit. An optimizer of ours says that it does so as theirs say it.

    Raises:
        TypeError: the optimizer does not know `found_inf`; it would make the update.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):  # in accelerate's wrapper
        optimizer = inner
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TypeError(f"{type(optimizer).__name__} cannot skip an update: it does not honour found_inf")
    optimizer.found_inf, optimizer.grad_scale = flag, None  # type: ignore[attr-defined]


class Guard:
    """Judges steps on the device, and reads the verdicts later.

    Args:
        device: of the losses.
        threshold: standard deviations that make a spike; 0 for none.
        window: losses before it that a loss is measured against.
        skip_spikes: whether the update of a spike is left out too.
        on_verdict: called on every process, in the order of the steps, with each step that stands out; what it raises
            ends the run on all of them at the same step.

    Attributes:
        skipped_in_a_row: updates that were left out one after the other, up to the last step that was read.
        state: what is remembered from step to step; belongs in a checkpoint, and is updated in place.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threshold: float,
        window: int,
        skip_spikes: bool,
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        self._threshold = threshold
        self._skip_spikes = skip_spikes
        self._on_verdict = on_verdict
        self._pinned = device.type == "cuda"
        self.skipped_in_a_row = 0
        # NaN where there was no loss yet: the mean is NaN too then, and no comparison with it holds.
        self.state = {
            "guard/window": torch.full((window,), torch.nan, device=device),
            "guard/skipped_in_a_row": torch.zeros((), device=device),
        }
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def judge(self, step: int, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return 1 on the device if the update of `step` (from 1) is to be left out, else 0.

        Args:
            step: counted from 1.
            loss: mean of the step over all processes, a scalar on the device.
            grad_norm: of the whole gradient before clipping, a scalar on the device.
        """
        window, in_a_row = self.state.values()
        finite = loss.isfinite()
        spike = torch.zeros_like(finite)
        if self._threshold:
            deviation, mean = torch.std_mean(window)
            spike = finite & (loss > mean + self._threshold * deviation)
            window.copy_(torch.where(finite, torch.cat([window[1:], loss[None]]), window))
        skipped = ~(finite & grad_norm.isfinite())
        if self._skip_spikes:
            skipped = skipped | spike
        in_a_row.copy_((in_a_row + 1) * skipped)
        self._send(step, torch.stack([loss, grad_norm, spike.float(), skipped.float(), in_a_row]))
        return skipped.float()

    def _send(self, step: int, record: Tensor) -> None:
        if not self._pinned:
            self._unread.append((step, record, None))
            return
        on_host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
        on_host.copy_(record, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._unread.append((step, on_host, arrived))

    def look_back(self) -> None:
        """Read the verdicts of steps so long ago that they have arrived; the same ones on every process."""
        self._read(keep=_LOOK_BACK)

    def look_at_all(self) -> None:
        """Read every verdict; waits for the device."""
        self._read(keep=0)

    def _read(self, *, keep: int) -> None:
        while len(self._unread) > keep:
            step, record, arrived = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            loss, grad_norm, spike, skipped, in_a_row = record.tolist()
            verdict = Verdict(step, loss, grad_norm, bool(spike), bool(skipped), int(in_a_row))
            self.skipped_in_a_row = verdict.in_a_row
            if verdict.skipped or verdict.spike:
                self._on_verdict(verdict)
