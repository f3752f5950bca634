"""The recipe's optimizer: AdamW, or Muon with AdamW for all that is not a matrix of a block.

Matrices and embeddings decay; one-dimensional parameters (biases, layer norms) do not. With Muon, only matrices decay.

A group with `lr_ratio` has this multiple of the scheduled learning rate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.optim.muon import Muon
from training.recipe import Recipe


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: matrices and embeddings decay; one-dimensional parameters (biases, layer norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: PreTrainedModel, recipe: Recipe, *, dtype: torch.dtype = torch.float32) -> Optimizer:
    """The recipe's optimizer for a model that is on its device, or sharded.

    Args:
        dtype: in which Muon orthogonalizes.
    """
    if recipe.optimizer == "muon":
        return _muon(model, recipe, dtype)
    return AdamW(
        decay_groups(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )


def _muon(model: PreTrainedModel, recipe: Recipe, dtype: torch.dtype) -> Muon:
    assert recipe.embedding_learning_rate is not None
    assert recipe.norm_learning_rate is not None
    assert recipe.muon_momentum is not None
    assert recipe.muon_momentum_warmup_steps is not None
    layers = [(name, layer.weight) for name, layer in model.named_modules() if isinstance(layer, Conv1D)]
    matrices = {parameter for _, parameter in layers}

    def group(parameters: list[nn.Parameter], learning_rate: float, **settings: Any) -> list[dict[str, Any]]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        ratio = {"lr": learning_rate, "lr_ratio": learning_rate / recipe.learning_rate}
        return [{"params": trained, **ratio, **settings}] if trained else []

    def chosen(condition: Callable[[nn.Parameter], bool]) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter not in matrices and condition(parameter)]

    query_key_value = [parameter for name, parameter in layers if name.endswith("attn.c_attn")]
    others = [parameter for name, parameter in layers if not name.endswith("attn.c_attn")]
    decay = {"weight_decay": recipe.weight_decay}
    adamw = {"weight_decay": 0.0, "betas": (recipe.adam_beta1, recipe.adam_beta2), "eps": recipe.adam_epsilon}
    return Muon(
        [
            *group(query_key_value, recipe.learning_rate, splits=3 * model.config.n_head, **decay),
            *group(others, recipe.learning_rate, splits=1, **decay),
        ],
        [
            *group(chosen(lambda p: p.dim() >= 2), recipe.embedding_learning_rate, **adamw),
            *group(chosen(lambda p: p.dim() < 2), recipe.norm_learning_rate, **adamw),
        ],
        momentum=recipe.muon_momentum,
        momentum_warmup_steps=recipe.muon_momentum_warmup_steps,
        dtype=dtype,
    )
