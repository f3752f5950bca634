"""The precision of a run's matrix products, and the loss scale of fp16.

Gradients below 6e-8 are 0 in fp16. So the loss is multiplied by a scale, and the gradients are divided by it before
they are clipped (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). torch's `GradScaler` halves the scale when
gradients overflow, whose update is skipped, and doubles it after 2,000 steps without an overflow.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def precision_name(accelerator: Accelerator) -> str:
    """The precision of matrix products: "bf16", "fp16" or "fp32"."""
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)


def autocast_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of matrix products."""
    return DTYPES[precision_name(accelerator)]


def add_loss_scaler(accelerator: Accelerator) -> None:
    """Give an accelerator for fp16 its loss scaler: on a CPU too, where accelerate would silently train in fp32."""
    if accelerator.mixed_precision != "fp16":
        return
    if accelerator.device.type == "cpu":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    assert accelerator.scaler is not None
    # Otherwise the first backward pass creates the scale, after a checkpoint is loaded.
    accelerator.scaler._lazy_init_scale_growth_tracker(accelerator.device)


def loss_scale_state(accelerator: Accelerator) -> dict[str, Tensor]:
    """The live tensors of the loss scaler, scalars on the device, for checkpoints; empty if there is none."""
    scaler = accelerator.scaler
    if scaler is None:
        return {}
    assert scaler._scale is not None
    assert scaler._growth_tracker is not None
    return {"loss_scale/scale": scaler._scale, "loss_scale/growth_tracker": scaler._growth_tracker}
