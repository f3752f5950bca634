"""What a model's own forward pass computes in vain while it is only scored, and is spared here.

Both are exact but for rounding (log-likelihoods stay within 1e-5 in float32; in bfloat16 one kernel rounds once where
eight round eight times, and a log-likelihood may move by some hundredths), hold for as long as a pass lasts, and leave
a model alone whose parts are not recognised. On a CPU in float32 they take an eighth off LAMBADA's time with the 124M
GPT-2.
"""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.activations import NewGELUActivation


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """Have GPT-2's activation `gelu_new` computed by one kernel, which passes over memory once, not by eight."""
    activations = [
        module for module in model.modules() if type(module) is NewGELUActivation and "forward" not in vars(module)
    ]  # one that has a `forward` of its own was wrapped by somebody, such as a hook of accelerate
    one_kernel = functools.partial(nn.functional.gelu, approximate="tanh")
    try:
        for activation in activations:
            activation.__dict__["forward"] = one_kernel
        yield
    finally:
        for activation in activations:
            activation.__dict__.pop("forward")


@contextmanager
def only_at(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Give the last block's MLP and the head these positions and no others: nothing else of what they make is read.

    The head's logits are then (1, positions, vocab_size). Hooks, and not modules called by hand: what a model does
    around its MLP and to its logits stays its own.
    """
    with ExitStack() as stack:
        if (mlp := _last_mlp(model)) is not None:
            whole: list[Tensor] = []

            def choose(module: nn.Module, args: Any) -> Any:
                whole[:] = args[:1]
                return (args[0][rows, columns][None], *args[1:])

            def put_back(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                everywhere = output.new_zeros(whole.pop().shape)
                everywhere[rows, columns] = output[0]
                return everywhere

            stack.callback(mlp.register_forward_pre_hook(choose).remove)
            stack.callback(mlp.register_forward_hook(put_back).remove)
        if (head := model.get_output_embeddings()) is not None:
            handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns][None], *args[1:]))
            stack.callback(handle.remove)
        yield


def _last_mlp(model: Any) -> nn.Module | None:
    """Return the MLP of the last of the model's blocks; None unless it is one of GPT-2's form, token by token."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number]
    mlp = getattr(blocks[0][-1], "mlp", None) if len(blocks) == 1 else None
    return mlp if {"c_fc", "c_proj"} <= set(getattr(mlp, "_modules", ())) else None
