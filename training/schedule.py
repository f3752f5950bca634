"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float = 0.1,
    schedule: Schedule = "cosine",
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    It rises linearly to `peak` over the warm-up, whose first step already moves (GPT-3's paper, and nanoGPT), and then
    falls to `min_ratio * peak`, which the step after the last would have.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return peak * (min_ratio + (1.0 - min_ratio) * remaining)
