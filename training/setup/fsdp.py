"""FSDP2: weights, gradients and optimizer state parted among the processes instead of held by each.

A block's weights are gathered just before it runs. The embeddings, the last norm and the head make one unit, the
model's own: the head is the token embedding, and the loss takes its weight without calling it, so a unit of its own
would never be gathered. That is why the sharding is done here; accelerate, which parts embedding and head from the
rest, finds it done and leaves it.

What it costs: each weight is sent twice a step more than under DDP, and held 1 / processes of the time.
"""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from common.cli_errors import InputError


def check_sharding_settings() -> None:
    """Refuse what `accelerate launch` says of FSDP and we cannot do.

    Raises:
        InputError: the first version of FSDP, whose flattened weights have no decay groups.
    """
    if not _asked_for():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(
            f"expected fsdp_version 2, found {version}; take accelerate_configs/fsdp2_8xa100.yaml as it is"
        )
    # Each process reads the weights by itself: transformers would leave all but the first without any.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def shard_on_cpus_too(accelerator: Accelerator) -> None:
    """Make accelerate take FSDP2 on CPU processes as it does on GPUs; by itself it leaves them to DDP unasked."""
    if _asked_for() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Every new view of the state takes the kind of processes from PartialState again.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Part the model's weights among the processes, in place; they move to the device as they are cut.

    In bf16 the weights are gathered and multiplied so; the master weights, the sums of gradients and the loss stay
    fp32 (torchtitan's choice: accelerate's own policy would round the loss and the sums too).

    Raises:
        InputError: more processes than a weight has rows.
    """
    rows = min(parameter.shape[0] for parameter in model.parameters())
    if rows < accelerator.num_processes:
        raise InputError(
            f"expected at least one row of each weight for each of {accelerator.num_processes} processes, found a "
            f"weight of {rows}; train a model this small with accelerate_configs/ddp_8xa100.yaml"
        )
    plugin = accelerator.state.fsdp_plugin
    in_bf16 = accelerator.mixed_precision == "bf16"
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if in_bf16
        else MixedPrecisionPolicy(),
    }
    for block in model.base_model.h:
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **settings)
    # The head is needed again at once, in the backward pass.
    fully_shard(model, reshard_after_forward=False, **settings)
    plugin.auto_wrap_policy = None  # done; the blocks' class, which accelerate would look for, has another name now


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile block by block: a graph of the whole model would break where weights are gathered."""
    for block in model.base_model.h:
        assert isinstance(block, nn.Module)
        block.compile()
