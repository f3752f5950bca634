"""AdamW that decays matrices and embeddings only, as for GPT-2."""

from torch import nn
from torch.optim import AdamW, Optimizer

from training.recipe import Recipe


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two parameter groups: matrices and embeddings decay; one-dimensional parameters (biases, layer norms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Fused AdamW with the recipe's settings."""
    return AdamW(
        decay_groups(model, recipe.weight_decay),
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )
