"""Blockwise attention: exact against fp64, compiled and not, and `sdpa` wherever it does not apply."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny
from torch import Tensor, nn
from torch.nn import functional

from gpt2_scratch import blockwise_attention as module
from gpt2_scratch.blockwise_attention import blockwise_attention, kept_weights

pytestmark = pytest.mark.parity  # it builds on interfaces of transformers


def query_key_value(seq: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq)
    return [torch.randn(2, 3, seq, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def output_and_gradients(attend: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
    """The output (batch, seq, n_head, head_dim) and the gradients of query, key and value, in fp64."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    output = attend(*leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    output.backward(upstream.to(output.dtype))
    return [tensor.detach().double() for tensor in (output, *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def errors(attend: Callable[..., Tensor], parts: list[Tensor]) -> list[float]:
    """Relative errors against attention in fp64."""

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3).transpose(1, 2)

    expected = output_and_gradients(exact, [part.detach().double() for part in parts])
    found = output_and_gradients(attend, parts)
    assert len(found) == len(expected) == 4
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def blockwise(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return blockwise_attention(nn.Identity(), query, key, value, None, scaling=0.3)[0]


@pytest.mark.parametrize("seq", [1, 5, 128, 129, 300, 1024])
def test_output_and_gradients_equal_fp64_within_the_rounding_of_bf16(seq: int) -> None:
    assert max(errors(blockwise, query_key_value(seq))) < 2 * 2**-8


# torch 2.13 itself instantiates a function that it compiles.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_without_a_break_it_is_as_exact() -> None:
    compiled = torch.compile(blockwise, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert max(errors(compiled, query_key_value(200))) < 2 * 2**-8


def test_no_query_reads_later_keys_and_values() -> None:
    query, key, value = query_key_value(200)
    before = blockwise(query, key, value)
    with torch.no_grad():
        key[:, :, 150:], value[:, :, 150:] = 9, 9
    assert torch.equal(before[:, :150], blockwise(query, key, value)[:, :150])


@pytest.mark.parametrize(
    ("dtype", "queries", "settings"),
    [
        (torch.float32, 40, {}),
        (torch.bfloat16, 40, {"is_causal": False}),
        (torch.bfloat16, 40, {"attention_mask": torch.ones(2, 1, 40, 40, dtype=torch.bool).tril(3)}),
        (torch.bfloat16, 1, {}),  # the other keys are cached
    ],
)
def test_what_it_does_not_do_is_left_to_sdpa(
    dtype: torch.dtype, queries: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "_CausalAttention")
    query, key, value = query_key_value(40, dtype)
    query = query[:, :, -queries:]
    found = blockwise_attention(
        nn.Identity(), query, key, value, **{"attention_mask": None, "scaling": 0.3, **settings}
    )
    mask = settings.get("attention_mask")
    attend = functools.partial(functional.scaled_dot_product_attention, query, key, value, scale=0.3)
    expected = attend(is_causal=not settings and queries > 1) if mask is None else attend(attn_mask=mask)
    torch.testing.assert_close(found[0], expected.transpose(1, 2))


def test_dropout_and_modules_that_are_not_causal_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "_CausalAttention")
    query, key, value = query_key_value(40)
    dropped = blockwise_attention(nn.Identity(), query, key, torch.ones_like(value), None, dropout=0.5)[0]
    assert dropped.float().std() > 0.1  # without dropout, all are 1
    both_ways = nn.Identity()
    both_ways.is_causal = False  # type: ignore[assignment]
    found = blockwise_attention(both_ways, query, key, value, None)[0]
    torch.testing.assert_close(found, functional.scaled_dot_product_attention(query, key, value).transpose(1, 2))


def test_a_model_trains_with_it_as_with_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    blocks = module._blocks
    monkeypatch.setattr(module, "_blocks", lambda seq: calls.append(seq) or blocks(seq))
    losses, gradients = [], []
    ids = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(1))
    for attention in ("sdpa", "blockwise"):
        model = tiny(attn_implementation=attention, n_positions=300).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, shift_labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.transformer.h[0].attn.c_attn.weight.grad)
        assert calls == ([] if attention == "sdpa" else 6 * [300])  # three layers, forward and backward
    # bf16 rounds to 2^-9; the errors of three layers add up.
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
    assert (gradients[0] - gradients[1]).norm() < 8 * 2**-9 * gradients[0].norm()


def test_a_second_derivative_is_refused() -> None:
    query, key, value = query_key_value(5)
    (first,) = torch.autograd.grad(blockwise(query, key, value).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_kept_weights_are_counted_per_query() -> None:
    assert kept_weights(128) == 128
    assert kept_weights(256) == (128 * 128 + 128 * 256) / 256
