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
from training.setup.launcher import uses_fsdp
from training.step.precision import autocast_dtype


def load_weights_on_every_rank() -> None:
    """Make transformers load the weights on every rank, not only on rank 0 as with accelerate's default for FSDP."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Make accelerate use FSDP2 on CPU processes too, where it silently uses DDP."""
    if uses_fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # AcceleratorState reads the type from PartialState whenever it is created.
        PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Shard the model across the processes, in place and on the device.

    In bf16 or fp16, weights are gathered and multiplied in it; master weights, gradient sums and the loss stay fp32, as
    in torchtitan. accelerate's own policy would round the loss and the sums too.

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
    dtype = autocast_dtype(accelerator)
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    settings = {
        "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        "offload_policy": plugin.cpu_offload,
        "mp_policy": MixedPrecisionPolicy() if dtype == torch.float32 else half,
    }
    for block in model.base_model.h:
        fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **settings)
    # The backward pass starts with the head, so its weights stay gathered.
    fully_shard(model, reshard_after_forward=False, **settings)
    plugin.auto_wrap_policy = None  # accelerate would look for the block class, which fully_shard has renamed
