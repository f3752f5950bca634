"""The arithmetic of an optimizer step: how its tokens fall on processes and forward passes."""

from dataclasses import dataclass

from common.cli_errors import InputError


@dataclass(frozen=True)
class BatchPlan:
    """How an optimizer step is cut: `accumulation_steps` forward passes of `per_device` sequences on each process."""

    seq_len: int
    sequences_per_step: int
    per_device: int
    num_processes: int

    @property
    def accumulation_steps(self) -> int:
        """Forward and backward passes of each process in one optimizer step."""
        return self.sequences_per_step // (self.per_device * self.num_processes)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all processes."""
        return self.sequences_per_step * self.seq_len

    @property
    def arithmetic(self) -> str:
        """How the step's tokens come about, in words."""
        processes = f"{self.num_processes} process{'es' if self.num_processes > 1 else ''}"
        return (
            f"{self.tokens_per_step:,} tokens a step = {self.per_device} × {self.seq_len} × {processes} × "
            f"{self.accumulation_steps} accumulated"
        )

    def samples(self, step: int, micro_step: int, rank: int) -> range:
        """Sample indices that process `rank` takes in forward pass `micro_step` of optimizer step `step`.

        Step `s` with `B` sequences is samples `sB … (s+1)B-1`, whatever the number of processes and passes: these only
        slice the batch.
        """
        first = step * self.sequences_per_step + (micro_step * self.num_processes + rank) * self.per_device
        return range(first, first + self.per_device)


def plan_batch(*, tokens_per_step: int, seq_len: int, per_device: int, num_processes: int) -> BatchPlan:
    """The plan for `tokens_per_step` tokens in windows of `seq_len` on `num_processes` processes.

    Raises:
        InputError: the step does not come out even; the message names the nearest step that does.
    """
    unit = per_device * seq_len * num_processes
    if tokens_per_step % unit:
        below = tokens_per_step // unit * unit
        nearest = [f"{tokens:,}" for tokens in (below, below + unit) if tokens]
        raise InputError(
            f"tokens_per_step={tokens_per_step:,} does not divide by per_device_train_batch_size {per_device} × "
            f"seq_len {seq_len} × {num_processes} process{'es' if num_processes > 1 else ''} = {unit:,} tokens; "
            f"nearest that do: {' and '.join(nearest)}, or change per_device_train_batch_size"
        )
    return BatchPlan(seq_len, tokens_per_step // seq_len, per_device, num_processes)
