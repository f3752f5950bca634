"""The arithmetic of an optimizer step."""

import pytest

from common.cli_errors import InputError
from training.step.batch_plan import plan_batch


def test_eight_processes_need_one_pass_for_the_classic_half_million_tokens() -> None:
    plan = plan_batch(tokens_per_step=524_288, seq_len=1024, per_device=64, num_processes=8)
    assert (plan.sequences_per_step, plan.accumulation_steps, plan.tokens_per_step) == (512, 1, 524_288)
    assert plan.samples(step=2, micro_step=0, rank=3) == range(1024 + 192, 1024 + 256)


def test_one_process_accumulates_what_eight_share() -> None:
    plan = plan_batch(tokens_per_step=524_288, seq_len=1024, per_device=64, num_processes=1)
    assert plan.accumulation_steps == 8
    assert plan.samples(step=2, micro_step=3, rank=0) == range(1024 + 192, 1024 + 256)


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(InputError, match=r"4 × seq_len 8 × 2 processes = 64 tokens; nearest that do: 64 and 128"):
        plan_batch(tokens_per_step=100, seq_len=8, per_device=4, num_processes=2)
    with pytest.raises(InputError, match=r"nearest that do: 64, or change"):
        plan_batch(tokens_per_step=10, seq_len=8, per_device=4, num_processes=2)
