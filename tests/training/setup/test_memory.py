"""The largest batch that fits, the same on all ranks, without side effects; and the memory estimate."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import one_thread, tiny  # noqa: F401

from common.cli_errors import InputError
from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM
from gpt2_scratch.blockwise_attention import kept_weights
from training import loop
from training.loop import train
from training.monitoring.run_history import read_metrics
from training.recipe import Recipe
from training.setup import memory
from training.setup.accelerator import build_accelerator
from training.setup.memory import block_activations, divisors, estimate_memory, find_batch_size
from training.step.batch_plan import plan_batch

Make = Callable[..., Recipe]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class OutOfMemoryAbove:
    """Records the batch sizes, and fails as CUDA does for more sequences than fit."""

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.tried: list[int] = []

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch = len(kwargs["input_ids"])
        self.tried.append(batch)
        if batch > self.sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def model_with_room_for(sequences: int) -> tuple[Any, OutOfMemoryAbove]:
    model, room = tiny(resid_pdrop=0.1), OutOfMemoryAbove(sequences)
    model.register_forward_pre_hook(room, with_kwargs=True)
    return model, room


@pytest.mark.parametrize(("room", "found"), [(100, 24), (24, 24), (23, 12), (11, 8), (7, 6), (5, 4), (1, 1)])
def test_largest_divisor_that_fits_is_found(room: int, found: int, tiny_recipe: Make) -> None:
    recipe = tiny_recipe(tokens_per_step=24 * 32, per_device_train_batch_size="auto")
    plan = plan_batch(tokens_per_step=recipe.tokens_per_step, seq_len=32, per_device=1, num_processes=1)
    model, counter = model_with_room_for(room)
    result = find_batch_size(plan, build_accelerator(recipe), model, recipe)
    assert (result.per_device, result.tokens_per_step) == (found, plan.tokens_per_step)
    assert result.per_device * result.accumulation_steps == 24
    # In descending order; the one that fits runs twice, because the second micro-step adds to the first's gradients.
    assert counter.tried == [size for size in reversed(divisors(24)) if size >= found] + [found]


def test_model_that_does_not_fit_is_a_one_line_error(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(per_device_train_batch_size="auto")
    plan = plan_batch(tokens_per_step=256, seq_len=32, per_device=1, num_processes=1)
    with pytest.raises(
        InputError, match="single sequence of seq_len=32 does not fit into the memory of cpu; train a sma"
    ):
        find_batch_size(plan, build_accelerator(recipe), model_with_room_for(0)[0], recipe)


def test_other_errors_are_not_taken_for_out_of_memory(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(per_device_train_batch_size="auto")
    plan = plan_batch(tokens_per_step=256, seq_len=32, per_device=1, num_processes=1)
    model = tiny()
    del model.lm_head
    with pytest.raises(AttributeError):
        find_batch_size(plan, build_accelerator(recipe), model, recipe)


def test_all_ranks_take_the_minimum(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(per_device_train_batch_size="auto")
    accelerator = build_accelerator(recipe)
    monkeypatch.setattr(accelerator, "gather", lambda found: torch.cat([found, torch.tensor([2, 8])]))
    plan = plan_batch(tokens_per_step=8 * 32 * 3, seq_len=32, per_device=1, num_processes=3)
    assert find_batch_size(plan, accelerator, tiny(), recipe).per_device == 2


def test_search_does_not_change_weights_or_random_state(tiny_recipe: Make) -> None:
    recipe = tiny_recipe(per_device_train_batch_size="auto")
    plan = plan_batch(tokens_per_step=256, seq_len=32, per_device=1, num_processes=1)
    model, _ = model_with_room_for(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, training = torch.get_rng_state(), model.training
    find_batch_size(plan, build_accelerator(recipe), model, recipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_on_a_cpu_is_limited_by_tokens_and_memory(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tokens_per_step=64 * 32, per_device_train_batch_size="auto")
    plan = plan_batch(tokens_per_step=64 * 32, seq_len=32, per_device=1, num_processes=1)
    monkeypatch.setattr(memory, "_CPU_TOKENS", 20 * 32)
    assert find_batch_size(plan, build_accelerator(recipe), tiny(), recipe).per_device == 16
    room = estimate_memory(tiny(), recipe, sequences=7).total
    monkeypatch.setattr(memory, "available_memory", lambda device, processes: 2 * room)
    assert find_batch_size(plan, build_accelerator(recipe), tiny(), recipe).per_device == 4
    assert memory._cpu_limit(tiny(), recipe, plan, torch.float32) == 7
    assert memory._cpu_limit(tiny(), recipe, plan, torch.bfloat16) > 7


def test_run_with_auto_sees_the_same_samples(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny_recipe(output_dir=str(tmp_path / "plain"), max_steps=6)
    train(plain)
    auto = dataclasses.replace(plain, output_dir=str(tmp_path / "auto"), per_device_train_batch_size="auto")
    train(dataclasses.replace(auto, max_steps=4, lr_scheduler_type="constant"))
    found = []

    def half(*arguments: Any) -> Any:  # less fits after a resume
        found.append(dataclasses.replace(find_batch_size(*arguments), per_device=2))
        return found[-1]

    monkeypatch.setattr(loop, "find_batch_size", half)
    train(dataclasses.replace(auto, lr_scheduler_type="constant"))
    assert found[0].accumulation_steps == 4
    log = (tmp_path / "auto" / "train.log").read_text()
    assert "= 8 × 32 × 1 process × 1 accumulated" in log  # the complete step
    assert "= 2 × 32 × 1 process × 4 accumulated" in log
    again = dataclasses.replace(plain, output_dir=str(tmp_path / "again"), lr_scheduler_type="constant")
    train(again)
    expected = [line["train_loss"] for line in read_metrics(tmp_path / "again") if "train_loss" in line]
    losses = [line["train_loss"] for line in read_metrics(tmp_path / "auto") if "train_loss" in line]
    # Sums are in another order, and AdamW amplifies the difference where a gradient is almost 0.
    assert losses == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def saved_by_a_block() -> Callable[..., int]:
    """Bytes that one more block saves for the backward pass."""

    def measured(bf16: bool, **config: Any) -> int:
        totals = []
        for n_layer in (1, 2):
            model = tiny(n_layer=n_layer, n_embd=64, activation_function="gelu_pytorch_tanh", **config).train()
            weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
            kept: dict[int, torch.Tensor] = {}

            def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
                kept[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            ids = torch.zeros(4, 48, dtype=torch.int64)
            keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), keeping:
                model(ids, shift_labels=ids, use_cache=False)
            totals.append(sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights))
        return totals[1] - totals[0]

    return measured


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "blockwise"])
def test_estimated_activations_are_what_a_block_saves(
    bf16: bool, attention: str, saved_by_a_block: Callable[..., int]
) -> None:
    copies = 12 * 64 * 64 * 2 if bf16 else 0  # autocast's copies of the block's weights
    expected = block_activations(
        4 * 48,
        64,
        size=2 if bf16 else 4,
        attention_scores=4 * 48 if attention == "eager" else 0,
        attention_weights=4 * kept_weights(48) if attention == "blockwise" and bf16 else 0,
    )
    # The estimate ignores means, variances and the like.
    assert saved_by_a_block(bf16, attn_implementation=attention) - copies == pytest.approx(expected, rel=0.03)


def test_estimate_of_gpt2_124m_equals_a_count_by_hand(tiny_recipe: Make) -> None:
    with torch.device("meta"):
        model = GPT2ScratchForCausalLM(GPT2ScratchConfig())
    recipe = tiny_recipe(seq_len=1024, tokens_per_step=524_288)
    on_gpu: dict[str, Any] = {"dtype": torch.bfloat16, "device_type": "cuda"}
    one, two = (estimate_memory(model, recipe, sequences=sequences, **on_gpu) for sequences in (1, 2))
    assert (one.weights, one.gradients, one.optimizer) == (497_759_232, 497_759_232, 995_518_464)
    # Muon keeps one moment of the 12 · 12 · 768² entries in matrices of the blocks, two of all else.
    muon = estimate_memory(model, tiny_recipe(seq_len=1024, optimizer="muon"), sequences=1)
    assert one.optimizer - muon.optimizer == 12 * 12 * 768**2 * 4
    # On a CPU, blockwise attention saves 128 · (128 + 256 + … + 1024) / 1024 = 576 weights per token and head.
    on_cpu = estimate_memory(model, recipe, sequences=2, dtype=torch.bfloat16)
    assert on_cpu.activations - two.activations == 2 * 1024 * 12 * 12 * 576 * 2
    masked = estimate_memory(model, dataclasses.replace(recipe, document_mask=True), sequences=2, dtype=torch.bfloat16)
    assert masked.activations == two.activations
    # Per token and channel: 36 bytes in a block, and 8 after the last one.
    assert two.activations - one.activations == 1024 * 768 * (36 * 12 + 8)
    shared = estimate_memory(model, recipe, sequences=1, num_processes=8, sharded=True, dtype=torch.bfloat16)
    assert shared.optimizer == 995_518_464 // 8
