"""Muon: against torch's, in the Conv1D layout, for special matrices, and what a skipped update leaves alone."""

import functools
from typing import Any

import pytest
import torch
from support.tiny_models import tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

from training.optim import muon as module
from training.optim.muon import Muon
from training.optim.optimizer import build_optimizer
from training.optim.orthogonalize import NEWTON_SCHULZ, orthogonalize
from training.recipe import Recipe
from training.step.guard import skip_update_if


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {"output_dir": "o", "data_dir": "d", "corpus": "c", "max_steps": 9, "optimizer": "muon"}
    return Recipe(**{**values, **changes})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def muon(*parameters: nn.Parameter, splits: int = 1, weight_decay: float = 0.0, **settings: Any) -> Muon:
    group = {"params": list(parameters), "lr": 0.02, "weight_decay": weight_decay, "splits": splits}
    other = {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.02}
    return Muon([group], [other], **{"second_moment_beta": None, **settings})


def after_steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_updates_equal_those_of_torch_for_the_transposed_layout(shape: tuple[int, int]) -> None:
    gradients = [random(*shape, seed=seed) for seed in range(1, 5)]
    ours = nn.Parameter(random(*shape))  # (in, out)
    theirs = nn.Parameter(random(*shape).mT.contiguous())  # (out, in)
    settings = {"coefficients": NEWTON_SCHULZ, "dtype": torch.bfloat16}  # torch has no other dtype
    found = after_steps(muon(ours, weight_decay=0.1, **settings), ours, gradients)
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)
    expected = after_steps(reference, theirs, [gradient.mT for gradient in gradients]).mT
    start = random(*shape)
    difference = (found - expected).norm() / (expected - start).norm()
    # bf16 products in another order: 0.4 % each, which the iterations amplify. A wrong scale would be 40 % or more.
    assert difference < 0.05


def test_one_step_equals_a_singular_value_decomposition_in_fp64() -> None:
    gradient = random(10, 30)
    parameter = nn.Parameter(torch.zeros(10, 30))
    found = after_steps(muon(parameter, momentum=0.9), parameter, [gradient]).double()
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    expected = -0.02 * 3**0.5 * left @ right  # out / in is 3; momentum changes only the length of the first gradient
    cosine = (found * expected).sum() / (found.norm() * expected.norm())
    assert cosine > 0.99  # the singular values are 0.86 to 1.14
    assert found.norm() / expected.norm() == pytest.approx(1, abs=0.15)


def test_query_key_and_value_are_orthogonalized_separately() -> None:
    gradient = random(8, 24)
    gradient[:, 8:16] *= 100
    together = nn.Parameter(torch.zeros(8, 24))
    found = after_steps(muon(together, splits=3), together, [gradient])
    for part, gradient_part in zip(found.chunk(3, dim=1), gradient.chunk(3, dim=1), strict=True):
        alone = nn.Parameter(torch.zeros(8, 8))
        torch.testing.assert_close(part, after_steps(muon(alone), alone, [gradient_part]))


def test_the_second_moment_gives_every_output_neuron_the_same_step_and_keeps_the_norm() -> None:
    gradient = random(32, 8)
    gradient[:, 0] *= 1e-3  # an output neuron with small gradients gets small orthogonal updates
    plain, normalized = nn.Parameter(torch.zeros(32, 8)), nn.Parameter(torch.zeros(32, 8))
    before = after_steps(muon(plain), plain, [gradient])
    after = after_steps(muon(normalized, second_moment_beta=0.95), normalized, [gradient])
    torch.testing.assert_close(after.norm(), before.norm())
    sizes = after.norm(dim=0)
    torch.testing.assert_close(sizes, sizes.mean().expand(8))
    assert before.norm(dim=0).std() > 10 * sizes.std()


def test_momentum_warms_up() -> None:
    gradients = [random(6, 6, seed=seed) for seed in range(3)]
    momenta = [0.85, 0.90, 0.95]  # two steps of warmup
    buffer = torch.zeros(6, 6)
    for gradient, momentum in zip(gradients, momenta, strict=True):
        buffer = momentum * buffer + (1 - momentum) * gradient
    parameter = nn.Parameter(torch.zeros(6, 6))
    optimizer = muon(parameter, momentum_warmup_steps=2)
    after_steps(optimizer, parameter, gradients)
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], buffer)


def test_a_zero_gradient_and_a_frozen_matrix_leave_weights_alone() -> None:
    model = tiny()
    frozen = model.transformer.h[0].mlp.c_fc.weight
    frozen.requires_grad_(False)
    optimizer = build_optimizer(model, recipe(weight_decay=0.0))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    assert all(parameter is not frozen for group in optimizer.param_groups for parameter in group["params"])


@pytest.mark.parametrize("matrices_are_frozen", [False, True])
def test_only_what_is_not_frozen_is_trained(matrices_are_frozen: bool) -> None:
    model = tiny()
    matrices = {layer.weight for layer in model.modules() if isinstance(layer, Conv1D)}
    for parameter in model.parameters():
        parameter.requires_grad_((parameter in matrices) != matrices_are_frozen)
    optimizer = build_optimizer(model, recipe())
    start = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = random(*parameter.shape) if parameter.requires_grad else None
    optimizer.step()
    for parameter, before in start.items():
        assert torch.equal(parameter, before) != parameter.requires_grad


def test_matrices_of_blocks_are_orthogonalized_and_all_else_is_left_to_adamw() -> None:
    model = tiny()
    optimizer = build_optimizer(
        model, recipe(learning_rate=0.02, embedding_learning_rate=4e-3, norm_learning_rate=1e-3)
    )
    names = {parameter: name.removeprefix("transformer.") for name, parameter in model.named_parameters()}
    groups = [(group, [names[parameter] for parameter in group["params"]]) for group in optimizer.param_groups]
    assert [group.get("splits") for group, _ in groups] == [3 * model.config.n_head, 1, None, None]
    assert all(name.endswith("attn.c_attn.weight") for name in groups[0][1])
    assert {name.split(".", 2)[2] for name in groups[1][1]} == {
        *("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }
    assert groups[2][1] == ["wte.weight", "wpe.weight"]
    assert all(name.endswith(".bias") or "ln_" in name for name in groups[3][1])
    assert sum(len(parameters) for _, parameters in groups) == len(names)
    assert [group["lr_ratio"] for group, _ in groups] == pytest.approx([1, 1, 0.2, 0.05])
    assert [group["weight_decay"] for group, _ in groups] == [0.01, 0.01, 0, 0]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = (tensor for state in optimizer.state.values() for tensor in state.values())
    return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]


def test_a_skipped_update_leaves_weights_and_state_bit_identical() -> None:
    model = tiny()
    optimizer = build_optimizer(model, recipe())
    states = []
    for step, (factor, flag) in enumerate([(1.0, 0.0), (torch.nan, 1.0), (1.0, 0.0)]):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = factor * random(*parameter.shape, seed=100 * step + number)
        skip_update_if(torch.tensor(flag), optimizer)
        optimizer.step()
        states.append(everything(model, optimizer))
    assert all(map(torch.equal, states[0], states[1]))
    assert all(tensor.isfinite().all() for tensor in states[2])
    assert not any(map(torch.equal, states[1], states[2]))


@pytest.mark.parametrize(("matrices", "processes"), [(1, 2), (5, 3), (4, 2)])
def test_every_process_takes_an_equal_part_of_the_matrices_or_zeros(
    matrices: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = torch.stack([random(6, 8, seed=seed) for seed in range(matrices)])
    optimizer = muon(nn.Parameter(torch.zeros(6, 8)))
    parts: list[Tensor] = []

    class Work:
        def wait(self) -> None:
            pass

    def gather(gathered: Tensor, own: Tensor, async_op: bool) -> Work:
        parts.append(own)
        if len(parts) == processes:
            gathered.copy_(torch.cat(parts))
        return Work()

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: processes)
    monkeypatch.setattr("torch.distributed.all_gather_into_tensor", gather)
    for rank in range(processes):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        finish = optimizer._shared_out(batch)
    assert {len(part) for part in parts} == {-(-matrices // processes)}
    torch.testing.assert_close(finish(), orthogonalize(batch))


def test_compiled_updates_equal_the_others_and_compile_once_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(12, 40), (40, 12)]

    def weights_after_steps() -> list[Tensor]:
        parameters = [nn.Parameter(random(*shape)) for shape in shapes]
        settings = {"second_moment_beta": 0.95, "momentum_warmup_steps": 3}
        optimizer = muon(*parameters, weight_decay=0.1, **settings)
        for step, skipped in enumerate([0.0, 0.0, 1.0, 0.0]):
            optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=step)
            skip_update_if(torch.tensor(skipped), optimizer)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    expected = weights_after_steps()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(module, "_is_compiled", lambda parameter: True)
    monkeypatch.setattr(
        module, "_compiled", functools.cache(lambda f: torch.compile(f, backend=counter, fullgraph=True, dynamic=False))
    )
    for found, weight in zip(weights_after_steps(), expected, strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 3 * len(shapes)
