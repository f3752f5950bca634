"""FSDP2: weights, gradients and optimizer state are sharded across the processes.

A block's weights are gathered just before it runs. Embeddings, final norm and head form one unit, the model itself: the
head shares the token embedding's weight, and the loss reads that weight without calling the head, so a separate unit
would never be gathered. accelerate would wrap embedding and head separately, so the sharding is done here; accelerate
leaves a sharded model alone.

Cost: each weight is communicated twice more per step than under DDP.
"""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from common.cli_errors import InputError


def check_fsdp_settings() -> None:
    """Raise an `InputError` if the launcher asks for FSDP version 1, whose flattened weights have no decay groups."""
    if not _is_requested():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"fsdp_version {version} is not supported; use accelerate_configs/fsdp2_8xa100.yaml")
    # Every process reads the weights itself; with this flag transformers would load them on rank 0 only.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Make accelerate use FSDP2 on CPU processes too, where it silently uses DDP."""
    if _is_requested() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # AcceleratorState reads the type from PartialState whenever it is created.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _is_requested() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard the model across the processes, in place and on the device.

    In bf16, weights are gathered and multiplied in bf16; master weights, gradient sums and the loss stay fp32, as in
    torchtitan. accelerate's own policy would round the loss and the sums too.

    Raises:
        InputError: a weight has fewer rows than there are processes.
    """
    rows = min(parameter.shape[0] for parameter in model.parameters())
    if rows < accelerator.num_processes:
        raise InputError(
            f"a weight with {rows} rows cannot be sharded across {accelerator.num_processes} processes; "
            "train a model this small with accelerate_configs/ddp_8xa100.yaml"
        )
    plugin = accelerator.state.fsdp_plugin
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
        "mp_policy": bf16 if accelerator.mixed_precision == "bf16" else MixedPrecisionPolicy(),
    }
    for block in model.base_model.h:
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **settings)
    # The backward pass starts with the head, so its weights stay gathered.
    fully_shard(model, reshard_after_forward=False, **settings)
    plugin.auto_wrap_policy = None  # accelerate would look for the block class, which fully_shard has renamed
