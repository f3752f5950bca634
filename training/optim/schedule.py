"""Learning rate as a pure function of the step and of the run's length, so that a resumed run needs no scheduler state.

A run that is given a new end has, from the step where it goes on, the learning rate that a run of that length has
there: after a decay that was already over, cosine and linear jump up. The rate of warmup_stable_decay does not depend
on the length before its decay begins, so its checkpoints of before can be given any end, several ends even.
"""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay"]


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float = 0.1,
    schedule: Schedule = "cosine",
    decay_steps: int | None = None,
) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    It rises linearly to `peak` over the warm-up, whose first step already moves (GPT-3's paper, and nanoGPT), and then
    falls to `min_ratio * peak`, which the step after the last would have; "constant" stays at the peak.

    "warmup_stable_decay" stays there until `decay_steps` before the end, a fifth of the run when not given, and falls
    as one minus a square root from then on: of the forms compared in Hägele et al., "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations" (2024, section 3), the best. The warm-up comes before the decay where
    there is no room for both.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    decay_start = warmup_steps
    if schedule == "warmup_stable_decay":
        decay_start = max(warmup_steps, total_steps - (total_steps // 5 if decay_steps is None else decay_steps))
    progress = min(1.0, max(0, step - decay_start) / max(1, total_steps - decay_start))
    return peak * (min_ratio + (1.0 - min_ratio) * _remaining(schedule, progress))


def _remaining(schedule: Schedule, progress: float) -> float:
    """How much of the way from the peak down is left, 1 to 0, after `progress` of the decay, 0 to 1."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1.0 - progress
    return 1.0 - math.sqrt(progress)
