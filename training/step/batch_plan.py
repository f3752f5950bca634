"""The batch arithmetic of an optimizer step: how its tokens are split into ranks and micro-steps."""

from dataclasses import dataclass

from common.cli_errors import InputError


@dataclass(frozen=True)
class BatchPlan:
    """A step of `sequences_per_step`: each rank runs `accumulation_steps` micro-steps of `per_device` sequences."""

    seq_len: int
    sequences_per_step: int
    per_device: int
    num_processes: int

    @property
    def accumulation_steps(self) -> int:
        """Micro-steps (forward and backward passes) of each rank in an optimizer step."""
        return self.sequences_per_step // (self.per_device * self.num_processes)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks."""
        return self.sequences_per_step * self.seq_len

    @property
    def arithmetic(self) -> str:
        """The factors of `tokens_per_step`, in words."""
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        return (
            f"{self.tokens_per_step:,} tokens a step = {self.per_device} × {self.seq_len} × {processes} × "
            f"{self.accumulation_steps} accumulated"
        )

    def samples(self, step: int, micro_step: int, rank: int) -> range:
        """Sample indices of a rank's micro-step.

        Step `s` with `B` sequences consists of samples `sB … (s+1)B-1`, for any number of ranks and micro-steps.
        """
        first = step * self.sequences_per_step + (micro_step * self.num_processes + rank) * self.per_device
        return range(first, first + self.per_device)


def plan_batch(*, tokens_per_step: int, seq_len: int, per_device: int, num_processes: int) -> BatchPlan:
    """The plan for `tokens_per_step` tokens in windows of `seq_len` on `num_processes` ranks.

    Raises:
        InputError: `tokens_per_step` is not a multiple of a micro-step's tokens; the nearest multiples are named.
    """
    unit = per_device * seq_len * num_processes
    if tokens_per_step % unit:
        below = tokens_per_step // unit * unit
        nearest = [f"{tokens:,}" for tokens in (below, below + unit) if tokens]
        raise InputError(
            f"tokens_per_step={tokens_per_step:,} is not a multiple of per_device_train_batch_size {per_device} × "
            f"seq_len {seq_len} × {num_processes} process{'es' if num_processes > 1 else ''} = {unit:,} tokens; "
            f"nearest multiples: {' and '.join(nearest)}. Choose one, or change per_device_train_batch_size"
        )
    return BatchPlan(seq_len, tokens_per_step // seq_len, per_device, num_processes)
