"""One optimizer step and one validation of a tiny model, on any number of ranks and micro-steps.

As a program, for `accelerate launch`: `one_step.py FOLDER PER_DEVICE …` writes a file of results per optimizer and
batch size.
"""

import itertools
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from support.tiny_models import tiny
from training.checkpoints.state_snapshot import bare_model
from training.data.loading.loader import IGNORED
from training.monitoring.validation import validation_loss
from training.recipe import OptimizerName, Recipe
from training.setup.accelerator import build_accelerator
from training.setup.model import prepare_for_training
from training.step.batch_plan import plan_batch
from training.step.guard import Guard
from training.step.train_step import train_step

SEQUENCES, SEQ_LEN, VALIDATION_SEQUENCES = 8, 20, 7


def recipe(optimizer: OptimizerName = "adamw") -> Recipe:
    return Recipe(
        optimizer=optimizer,
        output_dir="unused",
        data_dir="unused",
        corpus="unused",
        seq_len=SEQ_LEN,
        max_steps=1,
        mixed_precision="no",
        # The gradient of a key's bias is only rounding, which AdamW's default epsilon would turn into full steps.
        adam_epsilon=1e-2,
    )


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, 96, (count, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))


def one_step(accelerator: Accelerator, per_device: int, optimizer_name: OptimizerName = "adamw") -> dict[str, Tensor]:
    """Loss, gradient norm, weights after the step, and validation loss: full tensors on the host."""
    plan = plan_batch(
        tokens_per_step=SEQUENCES * SEQ_LEN,
        seq_len=SEQ_LEN,
        per_device=per_device,
        num_processes=accelerator.num_processes,
    )
    rank = accelerator.process_index
    model, optimizer = prepare_for_training(accelerator, tiny().train(), recipe(optimizer_name))
    ids = tokens(SEQUENCES, seed=1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for micro_step in range(plan.accumulation_steps):
            part = ids[list(plan.samples(0, micro_step, rank))]
            yield part[:, :-1], part[:, 1:]

    loss, norm = train_step(
        accelerator,
        model,
        optimizer,
        batches(),
        accumulation_steps=plan.accumulation_steps,
        learning_rate=1e-2,
        max_grad_norm=0.5,
    )[:2]
    scored, count = validation_loss(accelerator, model, _ragged(per_device, rank, accelerator.num_processes))
    full = get_model_state_dict(
        bare_model(accelerator, model), options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    results = {name: tensor.clone() for name, tensor in full.items()}
    results["loss"] = loss
    results["norm"] = norm
    results["validation"] = torch.tensor([scored, count], dtype=torch.float64)
    if isinstance(model, DistributedDataParallel):
        gradients = [parameter.grad for parameter in model.parameters()]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients if gradient is not None}
        results["gradient_storages"] = torch.tensor(len(storages))
    return results


def skipped_steps(accelerator: Accelerator, optimizer_name: OptimizerName) -> dict[str, Tensor]:
    """Whether a NaN loss on the last rank alone makes all ranks skip the update: the second of three steps has it."""
    model, optimizer = prepare_for_training(accelerator, tiny().train(), recipe(optimizer_name))
    guard = Guard(accelerator.device, threshold=0.0, window=2, skip_spikes=False)
    is_last_rank = accelerator.process_index == accelerator.num_processes - 1

    def insert_nan(module: nn.Module, inputs: object, outputs: Any) -> None:
        if is_last_rank and step == 2:
            outputs["loss"] = outputs.loss * torch.nan

    bare_model(accelerator, model).register_forward_hook(insert_nan)
    states = []
    for step in (1, 2, 3):
        ids = tokens(2, seed=accelerator.process_index + 2 * step)
        train_step(
            accelerator,
            model,
            optimizer,
            iter([(ids[:, :-1], ids[:, 1:])]),
            accumulation_steps=1,
            learning_rate=1e-2,
            max_grad_norm=0.5,
            guard=guard,
        )
        states.append([*_local_state(model, optimizer)])
    verdicts = guard.read(wait=True)
    same = [all(map(torch.equal, left, right)) for left, right in itertools.pairwise(states)]
    reported = [verdict.step for verdict in verdicts] == [2] and guard.skipped_in_a_row == 0
    return {
        name: accelerator.reduce(torch.tensor(float(value)), reduction="mean")
        for name, value in {"unchanged": same[0], "updated": not same[1], "reported": reported}.items()
    }


def _local_state(model: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    moments = (tensor for state in optimizer.state.values() for tensor in state.values())
    for tensor in itertools.chain(model.parameters(), moments):
        yield (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def _ragged(batch_size: int, rank: int, num_processes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Validation sequences of different lengths, in batches of one shape; ranks get unequal numbers of targets."""
    ids = tokens(VALIDATION_SEQUENCES, seed=2)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    for row in range(VALIDATION_SEQUENCES):
        targets[row, 2 * row + 3 :] = IGNORED
    per_round = batch_size * num_processes
    for first in range(rank * batch_size, -(-VALIDATION_SEQUENCES // per_round) * per_round, per_round):
        missing = batch_size - len(inputs[first : first + batch_size])
        yield (
            torch.cat([inputs[first : first + batch_size], torch.zeros(missing, SEQ_LEN, dtype=torch.int64)]),
            torch.cat([targets[first : first + batch_size], torch.full((missing, SEQ_LEN), IGNORED)]),
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2:]]
    accelerator = build_accelerator(recipe())
    for optimizer in typing.get_args(OptimizerName):
        for size in sizes:
            results = one_step(accelerator, size, optimizer)
            if accelerator.is_main_process:
                assert accelerator.num_processes == 2
                results["sharded"] = torch.tensor(accelerator.is_fsdp2)
                save_file(results, folder / f"{optimizer}-{size}.safetensors")
            accelerator.free_memory()
        results = skipped_steps(accelerator, optimizer)
        if accelerator.is_main_process:
            save_file(results, folder / f"{optimizer}-skipped.safetensors")
        accelerator.free_memory()
    accelerator.end_training()
