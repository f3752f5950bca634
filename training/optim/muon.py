"""Muon: momentum whose matrices are orthogonalized before they are added to the weights.

An update of AdamW is dominated by a few directions. Muon sets all singular values of a matrix's momentum to about 1, so
every direction moves equally far (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). NorMuon then gives
every output neuron a step of the same size (Li et al. 2025, arXiv 2510.05491). Embeddings, biases and layer norms stay
with AdamW.

What `torch.optim.Muon` lacks, and this has: the (in, out) layout of Conv1D; query, key and value of every head apart;
matrices of one shape in one batched product, shared out over the processes; sharded weights; skipped updates without a
host synchronization (`found_inf`).

Cost: 3 · n_embd / tokens_per_step of the operations of the blocks' forward and backward passes, over the number of
processes; with several, an all-gather of the blocks' updates, and one more of their momentum if weights are sharded.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer
from torch.utils._triton import has_triton

from training.optim.orthogonalize import POLAR_EXPRESS, Coefficients, orthogonalize

_FIRST_MOMENTUM = 0.85  # at the start of its warmup; modded-nanogpt
_EPSILON = 1e-10


class Muon(Optimizer):
    """Muon for groups of matrices, and fused AdamW for all other groups.

    Args:
        matrices: groups of matrices in (in, out) layout, each with `params`, `lr` and `weight_decay`, and `splits`: the
            number of matrices side by side in one parameter (3 · n_head for query, key and value). Parameters without a
            gradient are left alone.
        others: groups of AdamW, each with `params`, `lr`, `weight_decay`, `betas` and `eps`; may be empty.
        momentum: after `momentum_warmup_steps`, in which it rises from 0.85.
        second_moment_beta: decay of NorMuon's mean square per output neuron; None for plain Muon.
        coefficients: of the iteration; the default is five steps of Polar Express.
        dtype: in which matrices are orthogonalized.

    The update of a matrix is scaled by sqrt(max(1, out / in)), as `torch.optim.Muon` does for the (out, in) layout.
    """

    _step_supports_amp_scaling = True  # see training/step/guard.py

    def __init__(
        self,
        matrices: Iterable[dict[str, Any]],
        others: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        momentum_warmup_steps: int = 0,
        second_moment_beta: float | None = 0.95,
        coefficients: Coefficients = POLAR_EXPRESS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._momentum, self._momentum_warmup_steps = momentum, momentum_warmup_steps
        self._second_moment_beta = second_moment_beta
        self._coefficients, self._dtype = coefficients, dtype
        groups = list(others)
        self._adamw = AdamW(groups, fused=True) if groups else None  # which refuses to have no parameters
        super().__init__([*matrices, *(self._adamw.param_groups if self._adamw else [])], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient; if `found_inf` is 1, leave weights and state bit-identical."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip: Tensor | None = getattr(self, "found_inf", None)
        updated = [
            (parameter, group)
            for group in self.param_groups
            if "splits" in group
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        directions = [(self._updated_momentum(parameter, skip), group["splits"]) for parameter, group in updated]
        for (parameter, group), orthogonal in zip(updated, self._orthogonalized(directions), strict=True):
            self._apply(parameter, group, orthogonal, skip)
        if self._adamw is not None:
            # `load_state_dict` replaces state and groups, so the inner optimizer gets them before every step.
            self._adamw.param_groups = [group for group in self.param_groups if "splits" not in group]
            self._adamw.state = self.state
            self._adamw.found_inf, self._adamw.grad_scale = skip, None  # type: ignore[attr-defined]
            self._adamw.step()
        return loss

    def _updated_momentum(self, parameter: Tensor, skip: Tensor | None) -> Tensor:
        """Add the gradient to the momentum, and return the direction: Nesterov's, full even if weights are sharded."""
        state = self.state[parameter]
        if not state:
            device = parameter.device
            state["step"] = torch.zeros((), device=device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
            if self._second_moment_beta is not None:
                state["second_moment"] = torch.zeros(1, parameter.shape[1], device=device)
        assert parameter.grad is not None
        direction = _fused(_add_to_momentum, parameter)(
            _local(parameter.grad),
            _local(state["momentum_buffer"]),
            state["step"],
            skip,
            momentum=self._momentum,
            warmup_steps=self._momentum_warmup_steps,
            dtype=self._dtype,
        )
        if not isinstance(parameter, DTensor):
            return direction
        whole: Any = {"shape": parameter.shape, "stride": parameter.stride()}
        sharded = DTensor.from_local(direction, parameter.device_mesh, parameter.placements, run_check=False, **whole)
        return sharded.full_tensor()

    def _orthogonalized(self, directions: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """The orthogonalized directions, (rows, splits · columns) each, from pairs of a direction and its splits.

        Matrices of one shape are one batch. Every process orthogonalizes an equal part of each batch, while the parts
        of the batch before are gathered.
        """
        split = [direction.chunk(splits, dim=1) for direction, splits in directions]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in chain.from_iterable(split):
            wide = matrix.mT if _is_tall(matrix) else matrix
            by_shape.setdefault(wide.shape, []).append(wide)
        shared = [self._shared_out(torch.stack(matrices)) for matrices in by_shape.values()]
        done = {shape: iter(finish()) for shape, finish in zip(by_shape, shared, strict=True)}

        def orthogonal(matrix: Tensor) -> Tensor:
            return next(done[matrix.mT.shape]).mT if _is_tall(matrix) else next(done[matrix.shape])

        return [torch.cat(list(map(orthogonal, matrices)), dim=1) for matrices in split]

    def _shared_out(self, batch: Tensor) -> Callable[[], Tensor]:
        """Orthogonalize this process's part of a batch (matrices, rows, columns); the result waits for all parts."""
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes == 1:
            orthogonal = orthogonalize(batch, self._coefficients)
            return lambda: orthogonal
        each = math.ceil(len(batch) / processes)
        padded = torch.cat([batch, batch.new_zeros(each * processes - len(batch), *batch.shape[1:])])
        own = orthogonalize(padded[dist.get_rank() * each :][:each], self._coefficients).contiguous()
        gathered = torch.empty_like(padded)
        work = dist.all_gather_into_tensor(gathered, own, async_op=True)
        assert work is not None

        def finish() -> Tensor:
            work.wait()
            return gathered[: len(batch)]

        return finish

    def _apply(self, parameter: Tensor, group: dict[str, Any], orthogonal: Tensor, skip: Tensor | None) -> None:
        """Add the scaled update to the parameter, after decaying it."""
        splits = group["splits"]
        change = orthogonal.to(parameter.dtype)
        if self._second_moment_beta is not None:
            moment = self.state[parameter]["second_moment"]
            change = _fused(_rescaled, parameter)(change, moment, skip, beta=self._second_moment_beta, splits=splits)
        rows, columns = change.shape[0], change.shape[1] // splits
        if isinstance(parameter, DTensor):  # this process's rows; all have the full update, so nothing is sent
            mesh, placements = parameter.device_mesh, parameter.placements
            change = distribute_tensor(change, mesh, placements, src_data_rank=None).to_local()
        learning_rate = group["lr"]
        if _is_compiled(parameter):  # a number would be compiled into the kernels
            learning_rate = torch.full((), learning_rate, device=parameter.device)
        _fused(_move, parameter)(
            _local(parameter),
            change,
            learning_rate,
            skip,
            scale=math.sqrt(max(1.0, columns / rows)),
            weight_decay=group["weight_decay"],
        )


def _is_compiled(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda" and has_triton()


def _fused(function: Callable[..., Any], parameter: Tensor) -> Callable[..., Any]:
    """The function, compiled on a GPU: a few kernels for each matrix instead of forty."""
    return _compiled(function) if _is_compiled(parameter) else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _add_to_momentum(
    gradient: Tensor,
    buffer: Tensor,
    step: Tensor,
    skip: Tensor | None,
    *,
    momentum: float,
    warmup_steps: int,
    dtype: torch.dtype,
) -> Tensor:
    """Add the gradient to the momentum, and return Nesterov's direction."""
    factor: float | Tensor = momentum
    if warmup_steps:
        share = (step / warmup_steps).clamp(max=1)
        factor = _FIRST_MOMENTUM + (momentum - _FIRST_MOMENTUM) * share
    averaged = torch.lerp(buffer, gradient, 1 - factor)
    direction = torch.lerp(gradient, averaged, factor).to(dtype)
    _assign(buffer, averaged, skip)
    _assign(step, step + 1, skip)
    return direction


def _rescaled(change: Tensor, moment: Tensor, skip: Tensor | None, *, beta: float, splits: int) -> Tensor:
    """Divide every output neuron by its root mean square, and keep the norm of each matrix."""
    mean_squares = torch.lerp(moment, change.square().mean(dim=0, keepdim=True), 1 - beta)
    rescaled = change * (mean_squares + _EPSILON).rsqrt()
    shape = (change.shape[0], splits, -1)
    before, after = (tensor.reshape(shape).norm(dim=(0, 2)) for tensor in (change, rescaled))
    _assign(moment, mean_squares, skip)
    return (rescaled.reshape(shape) * (before / after.clamp(min=_EPSILON))[:, None]).reshape(change.shape)


def _move(
    weight: Tensor,
    change: Tensor,
    learning_rate: float | Tensor,
    skip: Tensor | None,
    *,
    scale: float,
    weight_decay: float,
) -> None:
    """Decay the weight and subtract the change."""
    _assign(weight, weight * (1 - learning_rate * weight_decay) - learning_rate * scale * change, skip)


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Set the target to the value, unless `skip` is 1; decided on the device."""
    target.copy_(value if skip is None else torch.where(skip == 1, target, value))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]
