"""Learning rate and sequence length as pure functions of the step, so a resumed run needs no scheduler state.

A run that is extended continues with the learning rate of a run of the new length: after a decay, cosine and linear
jump up. With warmup_stable_decay the rate before the decay does not depend on the length, so a checkpoint from there
can be continued to any length, or to several.
"""

import math

from training.recipe import Schedule


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

    Linear warmup to `peak`, starting above 0 (GPT-3's paper, nanoGPT), then decay to `min_ratio * peak` at
    `total_steps`. "constant" stays at the peak.

    "warmup_stable_decay" stays at the peak until `decay_steps` before the end (default: a fifth of the run), then
    decays as 1 - sqrt: the best of the forms in Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations" (2024, section 3). If the run is too short for both, the warmup comes first.
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


def sequence_length_at(step: int, *, seq_len: int, warmup_steps: int) -> int:
    """Tokens of a sequence in optimizer step `step`, counted from 0: a quarter of `seq_len`, then a half, then all.

    A step keeps its tokens: windows are cut, so it has more and shorter sequences (Li et al. 2022, arXiv 2108.06084).
    """
    if step >= warmup_steps:
        return seq_len
    return seq_len // 4 if 2 * step < warmup_steps else seq_len // 2


def _remaining(schedule: Schedule, progress: float) -> float:
    """The remaining fraction of the decay, from 1 to 0, as `progress` goes from 0 to 1."""
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1.0 - progress
    return 1.0 - math.sqrt(progress)
