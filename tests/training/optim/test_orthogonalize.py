"""Orthogonalization against a singular value decomposition in fp64."""

import pytest
import torch

from training.optim.orthogonalize import NEWTON_SCHULZ, POLAR_EXPRESS, Coefficients, orthogonalize


def random_matrices(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("coefficients", "low", "high"),
    # The ranges that five steps of either leave of singular values that are not tiny.
    [(POLAR_EXPRESS, 0.85, 1.15), (NEWTON_SCHULZ, 0.68, 1.21)],
    ids=["polar_express", "newton_schulz"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_singular_values_become_one_and_singular_vectors_stay(
    coefficients: Coefficients, low: float, high: float, dtype: torch.dtype
) -> None:
    matrices = random_matrices(3, 24, 96)
    found = orthogonalize(matrices.to(dtype), coefficients).double()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    in_their_basis = left.mT @ found @ right.mT  # (batch, rows, rows)
    values = in_their_basis.diagonal(dim1=-2, dim2=-1)
    # bf16 has 8 bits of mantissa; its errors add up over 15 products.
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert values.min() > low - tolerance
    assert values.max() < high + tolerance
    off_diagonal = in_their_basis - torch.diag_embed(values)
    assert off_diagonal.abs().max() < tolerance


def test_fp32_equals_the_same_iteration_in_fp64() -> None:
    matrices = random_matrices(2, 16, 64)
    expected = orthogonalize(matrices)
    # Each step multiplies a rounding error by up to 8; 1e-5 is about a hundred roundings.
    torch.testing.assert_close(orthogonalize(matrices.float()).double(), expected, rtol=0, atol=1e-5)


def test_the_scale_of_a_matrix_does_not_matter_and_zeros_stay_zeros() -> None:
    matrices = random_matrices(1, 8, 8).float()
    for scale in (1e-3, 1e4):
        torch.testing.assert_close(orthogonalize(matrices * scale), orthogonalize(matrices), rtol=1e-4, atol=1e-4)
    assert orthogonalize(torch.zeros(2, 4, 8)).count_nonzero() == 0


def test_a_batch_gives_what_its_matrices_give_alone() -> None:
    matrices = random_matrices(4, 12, 20).float()
    alone = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), alone)
