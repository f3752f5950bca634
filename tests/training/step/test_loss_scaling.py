"""Every split of a batch into ranks and micro-steps gives the same step, under DDP and FSDP2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launching import launched
from support.one_step import SEQUENCES, VALIDATION_SEQUENCES, one_step, recipe
from support.paths import ROOT
from support.tiny_models import one_thread  # noqa: F401
from torch import Tensor

from training.setup.accelerator import build_accelerator

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 1e-6) -> None:
    for name, tensor in expected.items():
        # Sums in a different order: fp32 rounding.
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=atol, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def one_pass() -> dict[str, Tensor]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return one_step(build_accelerator(recipe()), SEQUENCES)


@pytest.fixture(scope="module")
def one_pass_of_muon() -> dict[str, Tensor]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return one_step(build_accelerator(recipe("muon")), SEQUENCES, "muon")


def test_a_step_equals_one_of_the_plain_loss_over_all_tokens(one_pass: dict[str, Tensor]) -> None:
    import torch.nn.functional as F
    from support.one_step import tokens
    from support.tiny_models import tiny

    ids = tokens(SEQUENCES, seed=1)
    model = tiny().train()
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(one_pass["loss"], loss.detach())
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert norm > 0.5  # so that it is clipped
    torch.testing.assert_close(one_pass["norm"], norm)
    assert one_pass["validation"][1] == sum(2 * row + 3 for row in range(VALIDATION_SEQUENCES))


@pytest.mark.parametrize("per_device", [4, 2, 1])
def test_accumulation_makes_no_difference(per_device: int, one_pass: dict[str, Tensor]) -> None:
    assert_same_step(one_step(build_accelerator(recipe()), per_device), one_pass)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_2_processes", "fsdp2_8xa100"])
def test_two_processes_make_no_difference(
    config: str, one_pass: dict[str, Tensor], one_pass_of_muon: dict[str, Tensor], tmp_path: Path
) -> None:
    done = launched(config, str(ROOT / "tests" / "support" / "one_step.py"), str(tmp_path), "4", "2", "1")
    assert done.returncode == 0, done.stderr
    # Orthogonalisation divides by the singular values, and with them the rounding of the small ones.
    for optimizer, expected, atol in (("adamw", one_pass, 1e-6), ("muon", one_pass_of_muon, 2e-5)):
        for per_device in (4, 2, 1):
            found = load_file(tmp_path / f"{optimizer}-{per_device}.safetensors")
            assert found["sharded"].item() == (config == "fsdp2_8xa100")
            if config == "cpu_2_processes":  # all gradients are in the bucket that ranks exchange, without copies
                assert found["gradient_storages"].item() == 1
            assert_same_step(found, expected, atol=atol)
        # A NaN loss on one rank: all ranks skip the update.
        skipped = load_file(tmp_path / f"{optimizer}-skipped.safetensors")
        assert {name: flag.item() for name, flag in skipped.items()} == {"unchanged": 1, "updated": 1, "reported": 1}
