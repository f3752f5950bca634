"""The state of a run after a step, collected from all processes into the main process's memory.

Collecting is what all processes do together, on the training thread; whoever holds a `Snapshot` can write it alone and
later. Sharded tensors (FSDP2) are put together one by one, so no device ever holds more than one whole tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
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


def collect_snapshot(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loop_state: Mapping[str, Tensor]
) -> Snapshot | None:
    """The state of the run as it is now; called by all processes together.

    Returns:
        The snapshot on the main process, None on others. On a CPU its tensors are the live ones: write them before the
        next step.
    """
    bare = bare_model(accelerator, model)
    keep = accelerator.is_main_process
    weights = _on_the_host(_weights(bare), keep)
    moments = _on_the_host(_moments(bare, optimizer), keep)
    rng_states = _rng_states_of_all(accelerator)
    if not keep:
        return None
    return Snapshot(weights, moments, rng_states, _on_the_host(loop_state, keep))


def bare_model(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """The model without what `prepare` and `torch.compile` wrapped around it."""
    return accelerator.unwrap_model(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def _weights(bare: PreTrainedModel) -> dict[str, Any]:
    tied = bare.all_tied_weights_keys
    return {name: tensor for name, tensor in get_model_state_dict(bare).items() if name not in tied}


def _moments(bare: PreTrainedModel, optimizer: Optimizer) -> dict[str, Any]:
    by_parameter = cast(dict[str, dict[str, Any]], get_optimizer_state_dict(bare, optimizer)["state"])
    return {f"{name}/{moment}": tensor for name, moments in by_parameter.items() for moment, tensor in moments.items()}


def _on_the_host(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors whole and on the CPU, where they are kept; elsewhere nothing, but shards are given to who keeps."""
    host = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            host[name] = whole.detach().to("cpu").contiguous()
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
