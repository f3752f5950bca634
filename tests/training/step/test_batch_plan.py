"""The arithmetic of an optimizer step."""

import pytest

from common.cli_errors import InputError
from training.step.batch_plan import plan_batch


def test_eight_ranks_take_half_a_million_tokens_in_one_micro_step() -> None:
    plan = plan_batch(tokens_per_step=524_288, seq_len=1024, per_device=64, num_processes=8)
    assert (plan.sequences_per_step, plan.accumulation_steps, plan.tokens_per_step) == (512, 1, 524_288)
    assert plan.samples(step=2, micro_step=0, rank=3) == range(1024 + 192, 1024 + 256)


def test_one_rank_accumulates_the_batches_of_eight() -> None:
    plan = plan_batch(tokens_per_step=524_288, seq_len=1024, per_device=64, num_processes=1)
    assert plan.accumulation_steps == 8
    assert plan.samples(step=2, micro_step=3, rank=0) == range(1024 + 192, 1024 + 256)


def test_an_error_names_the_nearest_step_that_divides_evenly() -> None:
    with pytest.raises(InputError, match=r"4 × seq_len 8 × 2 processes = 64 tokens; nearest multiples: 64 and 128"):
        plan_batch(tokens_per_step=100, seq_len=8, per_device=4, num_processes=2)
    with pytest.raises(InputError, match=r"nearest multiples: 64\. Choose one, or change"):
        plan_batch(tokens_per_step=10, seq_len=8, per_device=4, num_processes=2)
