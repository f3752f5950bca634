"""The state of a run after a step, collected from all processes into the main process's memory.

Collecting is what all processes do together, on the training thread; whoever holds a `Snapshot` can write it alone and
later. Sharded tensors (FSDP2) are put together one by one, so no device ever holds more than one whole tensor.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from; all tensors are whole and on the CPU.

    Attributes:
        weights: by the names of `from_pretrained`; tied weights stand once.
        optimizer: by `parameter/moment`.
        rng_states: the random-number generators of each process.
        loop_state: what the loop itself remembers from step to step.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng_states: list[dict[str, Tensor]]
    loop_state: dict[str, Tensor]


@dataclass
class HostMemory:
    """Memory that one snapshot after the other is copied into.

    Memory that nobody has written to yet costs a page fault every 4 KiB, which takes longer than the copy; so it is
    made, and touched, beside the first steps, and kept.
    """

    _tensors: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)
    _used: dict[tuple[torch.Size, torch.dtype], int] = field(default_factory=dict)
    _making: threading.Thread | None = None

    def make_for(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        """Make, on a thread, the memory that a model and its optimizer's state will need."""
        tensors = [*model.parameters()]
        tensors += [tensor for state in optimizer.state.values() for tensor in state.values()]
        likes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self._making = threading.Thread(target=self._make, args=(likes, device), name="host memory", daemon=True)
        self._making.start()

    def _make(self, likes: list[tuple[torch.Size, torch.dtype]], device: torch.device) -> None:
        for shape, dtype in likes:
            self._tensors.setdefault((shape, dtype), []).append(self._new(shape, dtype, device).zero_())

    @staticmethod
    def _new(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def begin(self) -> None:
        """Take all of the memory for the next snapshot; what was copied before is overwritten."""
        if self._making is not None:
            self._making.join()
            self._making = None
        self._used.clear()

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor on the host; one from a GPU is there after `torch.cuda.synchronize`."""
        like = (tensor.shape, tensor.dtype)
        number, tensors = self._used.get(like, 0), self._tensors.setdefault(like, [])
        if number == len(tensors):
            tensors.append(self._new(*like, tensor.device))
        self._used[like] = number + 1
        return tensors[number].copy_(tensor, non_blocking=True)


def collect_snapshot(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    loop_state: Mapping[str, Tensor],
    memory: HostMemory | None = None,
) -> Snapshot | None:
    """The state of the run as it is now; called by all processes together.

    Returns:
        The snapshot on the main process, None on others. It is a copy in `memory`. Without that, tensors on a CPU are
        the live ones: write them before the next step.
    """
    if memory is not None:
        memory.begin()
    bare = bare_model(accelerator, model)
    keep = accelerator.is_main_process
    weights = _on_the_host(_weights(bare), keep, memory)
    moments = _on_the_host(_moments(bare, optimizer), keep, memory)
    remembered = _on_the_host(loop_state, keep, memory)
    rng_states = _rng_states_of_all(accelerator)
    if not keep:
        return None
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)
    return Snapshot(weights, moments, rng_states, remembered)


def bare_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """The model without what `prepare` and `torch.compile` wrapped around it."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _weights(bare: PreTrainedModel) -> dict[str, Any]:
    tied = bare.all_tied_weights_keys
    return {name: tensor for name, tensor in get_model_state_dict(bare).items() if name not in tied}


def _moments(bare: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    by_parameter = cast(dict[str, dict[str, Any]], get_optimizer_state_dict(bare, optimizer)["state"])
    return {f"{name}/{moment}": tensor for name, moments in by_parameter.items() for moment, tensor in moments.items()}


def _on_the_host(tensors: Mapping[str, Tensor], keep: bool, memory: HostMemory | None) -> dict[str, Tensor]:
    """The tensors whole and on the CPU, where they are kept; elsewhere nothing, but shards are given to who keeps."""
    host = {}
    for name, tensor in tensors.items():
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        if keep:
            host[name] = whole.to("cpu").contiguous() if memory is None else memory.copy(whole)
    return host


def _rng_states_of_all(accelerator: Accelerator) -> list[dict[str, Tensor]]:
    own = rng_state(accelerator.device)
    sizes = [state.numel() for state in own.values()]
    every = accelerator.gather(torch.cat(list(own.values())).to(accelerator.device)[None]).cpu()  # (processes, bytes)
    return [dict(zip(own, (part.clone() for part in row.split(sizes)), strict=True)) for row in every]


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of this process's random-number generators, bytes (n,)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the states of `rng_state` back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
