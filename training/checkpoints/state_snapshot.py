"""The state of a run after a step, gathered from all ranks into the memory of rank 0.

All ranks gather together, on the training thread. Rank 0 can then write the `Snapshot` alone and later. Sharded tensors
(FSDP2) are gathered one by one, so no device ever holds more than one full tensor.
"""

import contextlib
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Snapshot:
    """The state that a checkpoint is written from. All tensors are full and on the CPU."""

    weights: dict[str, Tensor]  # by the names of `from_pretrained`; tied weights once
    optimizer: dict[str, Tensor]  # by `parameter/moment`
    rng_states: list[dict[str, Tensor]]  # of each rank
    loop_state: dict[str, Tensor]  # of the loop itself, such as the guard's


class HostMemory:
    """Host memory that is reused for every snapshot.

    The first write to fresh memory costs a page fault per 4 KiB, which takes longer than the copy. So the memory is
    allocated and touched in the background of the first steps, and kept.
    """

    def __init__(self) -> None:
        self._tensors: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._used: Counter[tuple[torch.Size, torch.dtype]] = Counter()
        self._allocation: threading.Thread | None = None

    def allocate_for(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        """Allocate, on a thread, the memory for a model and its optimizer state."""
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        shapes = [(tensor.shape, tensor.dtype) for tensor in [*model.parameters(), *states]]

        def allocate() -> None:
            with contextlib.suppress(RuntimeError, MemoryError):  # not enough memory: the first snapshot reports it
                for shape, dtype in shapes:
                    self._tensors[shape, dtype].append(_host_tensor(shape, dtype, device).zero_())

        self._allocation = threading.Thread(target=allocate, name="host memory", daemon=True)
        self._allocation.start()

    def begin(self) -> None:
        """Start the next snapshot, which overwrites the previous one."""
        if self._allocation is not None:
            self._allocation.join()
        self._used.clear()

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of the tensor on the host. From a GPU it is complete after `torch.cuda.synchronize`."""
        key = (tensor.shape, tensor.dtype)
        used, tensors = self._used[key], self._tensors[key]
        if used == len(tensors):
            tensors.append(_host_tensor(*key, tensor.device))
        self._used[key] += 1
        return tensors[used].copy_(tensor, non_blocking=True)


def _host_tensor(shape: torch.Size, dtype: torch.dtype, copied_from: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=copied_from.type == "cuda")


def collect_snapshot(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loop_state: Mapping[str, Tensor],
    memory: HostMemory | None = None,
) -> Snapshot | None:
    """Return the current state of the run on rank 0, and None on other ranks. All ranks call this together.

    The snapshot is a copy in `memory`. Without it, tensors on a CPU are the live ones: write them before the next step.
    """
    if memory is not None:
        memory.begin()
    bare = bare_model(accelerator, model)
    keep = accelerator.is_main_process
    tied = bare.all_tied_weights_keys
    # Before the optimizer's state, which is found by the sharded parameters: this reshards them under FSDP2.
    named: dict[str, Any] = {name: tensor for name, tensor in get_model_state_dict(bare).items() if name not in tied}
    weights = _to_host(named, keep, memory)
    by_parameter = cast(dict[str, dict[str, Any]], get_optimizer_state_dict(bare, optimizer)["state"])
    state = {f"{name}/{key}": tensor for name, moments in by_parameter.items() for key, tensor in moments.items()}
    moments, loop = (_to_host(tensors, keep, memory) for tensors in (state, loop_state))
    rng_states = gather_object([rng_state(accelerator.device)])
    if not keep:
        return None
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    return Snapshot(weights, moments, rng_states, loop)


def bare_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """Return the model without the wrappers of `accelerator.prepare` and `torch.compile`."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _to_host(tensors: Mapping[str, Tensor], keep: bool, memory: HostMemory | None) -> dict[str, Tensor]:
    """Gather full tensors on rank 0; other ranks take part and return {}."""
    host = {}
    for name, tensor in tensors.items():
        full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if keep:
            host[name] = full.to("cpu").contiguous() if memory is None else memory.copy(full)
    return host


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this rank's random-number generators, as uint8 (n,)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the states that `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
