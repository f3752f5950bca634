import os
import sys

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from gpt2_scratch import linear_cross_entropy

# The package exports the function under the name of its module.
module = sys.modules["gpt2_scratch.linear_cross_entropy"]


@pytest.fixture(autouse=True, params=["many chunks", "default chunks", "as on a GPU", "kernel"])
def chunks(request, monkeypatch):
    """Also use chunks and softmax blocks that do not divide the input evenly, and the padded vocabulary of a GPU."""
    if request.param == "many chunks":
        monkeypatch.setattr(module, "_CHUNK_TOKENS", 13)
        monkeypatch.setattr(module, "_SOFTMAX_LOGITS", 5 * 101 + 3)
    if request.param in ("as on a GPU", "kernel"):
        columns = module._chunk_shape(101, "cuda")[1]
        assert columns == 128
        monkeypatch.setattr(module, "_chunk_shape", lambda vocab_size, device: (13, -(-vocab_size // 64) * 64))
    if request.param == "kernel":
        if module.triton is None or os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("needs the package triton, and TRITON_INTERPRET=1, to run the kernel on a CPU")
        monkeypatch.setattr(module, "_softmax_in_blocks", module._softmax_by_row)
        monkeypatch.setattr(module, "_ROW_BLOCK", 64)


def problem(tokens=50, n_embd=24, vocab_size=101, dtype=torch.float32, ignored=0):
    torch.manual_seed(0)
    hidden_states = torch.randn(tokens, n_embd, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, n_embd, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab_size, (tokens,))
    targets[torch.randperm(tokens)[:ignored]] = -100
    return hidden_states, weight, targets


def plain(hidden_states, weight, targets, **options):
    return F.cross_entropy((hidden_states @ weight.T).float(), targets, **options)


def loss_and_gradients(function, hidden_states, weight, targets, factor=1.0, autocast=False, **options):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(hidden_states, weight, targets, **options)
    return loss.detach(), *torch.autograd.grad(loss * factor, (hidden_states, weight))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [0, 17])
def test_fp32_loss_and_gradients_equal_the_plain_expression(reduction, ignored):
    arguments = problem(ignored=ignored)
    expected = loss_and_gradients(plain, *arguments, reduction=reduction)
    found = loss_and_gradients(linear_cross_entropy, *arguments, reduction=reduction)
    for one, other in zip(found, expected, strict=True):
        # Chunks are summed in another order, which changes a few units in the last place of fp32.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * other.abs().max().item())
    assert found[0].dtype == torch.float32


def test_upstream_gradient_scales_the_gradients():
    arguments = problem()
    once = loss_and_gradients(linear_cross_entropy, *arguments)
    scaled = loss_and_gradients(linear_cross_entropy, *arguments, factor=0.25)
    for one, other in zip(scaled[1:], once[1:], strict=True):
        # A power of two scales exactly, except for the division of the mean.
        torch.testing.assert_close(one, other * 0.25, rtol=1e-6, atol=0)


def test_gradients_equal_finite_differences():
    arguments = problem(tokens=29, n_embd=5, vocab_size=11, dtype=torch.float64, ignored=3)
    # With the 7 digits of an fp32 loss, finite differences of step 1e-2 are accurate to 2 digits.
    gradients = torch.autograd.grad(linear_cross_entropy(*arguments), arguments[:2])
    for argument, gradient in zip(arguments[:2], gradients, strict=True):
        for index in range(0, argument.numel(), 7):
            losses = []
            for step in (1e-2, -1e-2):
                with torch.no_grad():
                    argument.view(-1)[index] += step
                    losses.append(linear_cross_entropy(*arguments).item())
                    argument.view(-1)[index] -= step
            slope = (losses[0] - losses[1]) / 2e-2
            assert gradient.view(-1)[index].item() == pytest.approx(slope, rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_autocast_is_as_close_to_fp64_as_the_plain_expression(compiled):
    arguments = problem(tokens=200, ignored=20)

    def exact(hidden_states, weight, targets):
        return F.cross_entropy(hidden_states.double() @ weight.double().T, targets)

    function = linear_cross_entropy
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(exact, *arguments)
    reference = loss_and_gradients(plain, *arguments, autocast=True)
    found = loss_and_gradients(function, *arguments, autocast=True)
    for one, other, true in zip(found, reference, expected, strict=True):
        assert one.dtype == torch.float32
        # Products in bf16 (8 bits) have this error with and without chunks.
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 1e-4 * true.norm()


def test_bf16_parameters_get_bf16_gradients():
    arguments = problem(dtype=torch.bfloat16)
    loss, hidden_gradient, weight_gradient = loss_and_gradients(linear_cross_entropy, *arguments)
    assert (loss.dtype, hidden_gradient.dtype, weight_gradient.dtype) == (torch.float32, *[torch.bfloat16] * 2)
    expected = loss_and_gradients(plain, *arguments)
    for one, other in zip((loss, hidden_gradient, weight_gradient), expected, strict=True):
        # bf16 has 8 bits, so 2**-8 of the value, and as much of the typical gradient where terms cancel.
        torch.testing.assert_close(
            one.float(),
            other.float(),
            rtol=2e-2,
            atol=2e-2 * other.float().std().item() + 1e-3 if other.dim() else 1e-3,
        )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_label_smoothing_and_z_loss_equal_the_plain_expression(label_smoothing, z_loss):
    def expected(hidden_states, weight, targets):
        logits = hidden_states @ weight.T
        squares = logits.logsumexp(1).square()[targets != -100]
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing) + z_loss * squares.mean()

    arguments = problem(ignored=7)
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    found = loss_and_gradients(linear_cross_entropy, *arguments, **options)
    for one, other in zip(found, loss_and_gradients(expected, *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_second_derivative_is_refused():
    hidden_states, weight, targets = problem()
    loss = linear_cross_entropy(hidden_states, weight, targets).square()
    gradient = torch.autograd.grad(loss, weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_without_gradients_only_the_loss_is_computed():
    hidden_states, weight, targets = problem()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden_states, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden_states, weight, targets).detach(), rtol=1e-6, atol=1e-6)


def test_only_the_required_gradient_is_computed():
    hidden_states, weight, targets = problem()
    loss = linear_cross_entropy(hidden_states.detach(), weight, targets)
    loss.backward()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(plain(hidden_states, weight, targets), weight)[0])


@pytest.mark.parametrize(("frozen", "products"), [("neither", 3), ("weight", 2), ("hidden states", 2), ("both", 1)])
def test_matrix_products_of_frozen_inputs_are_not_computed(frozen, products, monkeypatch):
    hidden_states, weight, targets = problem(tokens=3)  # one chunk
    hidden_states.requires_grad_(frozen not in ("hidden states", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    calls = []
    for name in ("mm", "addmm"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, product=product, **out: calls.append(1) or product(*args, **out))
    loss = linear_cross_entropy(hidden_states, weight, targets)
    assert len(calls) == products
    assert loss.requires_grad == (frozen != "both")


def test_upstream_gradient_is_not_rounded_to_the_parameters_dtype():
    # 1 / 50 in bf16 is 0.02002: every gradient would be larger by a thousandth.
    arguments = problem(tokens=50, n_embd=64, dtype=torch.bfloat16)
    summed = loss_and_gradients(linear_cross_entropy, *arguments, reduction="sum")
    mean = loss_and_gradients(linear_cross_entropy, *arguments)
    for one, other in zip(mean[1:], summed[1:], strict=True):
        ratio = (one.double() * other.double()).sum() / other.double().square().sum()
        # Rounding errors of 8 bits average out over thousands of entries.
        assert ratio.item() == pytest.approx(1 / 50, rel=3e-4)


def test_backward_can_run_twice_on_a_retained_graph():
    hidden_states, weight, targets = problem()
    loss = linear_cross_entropy(hidden_states, weight, targets)
    first = torch.autograd.grad(3 * loss, weight, retain_graph=True)[0]
    second = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close(first, 3 * second)


def test_several_leading_dimensions_are_accepted():
    hidden_states, weight, targets = problem()
    folded = linear_cross_entropy(hidden_states.view(5, 10, -1), weight, targets.view(5, 10))
    assert folded == linear_cross_entropy(hidden_states, weight, targets)


def test_extreme_logits_stay_finite():
    hidden_states, weight, targets = problem()
    loss, *gradients = loss_and_gradients(
        linear_cross_entropy, (hidden_states * 1e4).detach().requires_grad_(), weight, targets
    )
    torch.testing.assert_close(loss, plain(hidden_states * 1e4, weight, targets).detach())
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_all_targets_ignored_gives_what_the_plain_expression_gives():
    for reduction in ("mean", "sum"):
        loss, *gradients = loss_and_gradients(linear_cross_entropy, *problem(ignored=50), reduction=reduction)
        expected = loss_and_gradients(plain, *problem(ignored=50), reduction=reduction)[0]
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_input_gives_what_the_plain_expression_gives(reduction):
    found, expected = (
        loss_and_gradients(function, *problem(tokens=0), reduction=reduction)
        for function in (linear_cross_entropy, plain)
    )
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_meta_device_gives_a_loss_and_gradients():
    hidden_states, weight, targets = (part.detach().to("meta") for part in problem())
    arguments = hidden_states.requires_grad_(), weight.requires_grad_(), targets
    loss, *gradients = loss_and_gradients(linear_cross_entropy, *arguments)
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    assert [gradient.shape for gradient in gradients] == [hidden_states.shape, weight.shape]


def test_compiles_to_one_graph_with_the_same_values():
    arguments = problem(ignored=7)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected, found = (loss_and_gradients(f, *arguments) for f in (linear_cross_entropy, compiled))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compiled_graph_holds_no_logits():
    arguments = problem(tokens=60)
    sizes = []

    def record(graph, _):
        sizes.extend(node.meta["val"].numel() for node in graph.graph.nodes if hasattr(node.meta.get("val"), "numel"))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    loss_and_gradients(torch.compile(linear_cross_entropy, fullgraph=True, backend=backend), *arguments)
    assert len(sizes) > 5
    assert max(sizes) == 101 * 24  # the weight; the logits would be 60 × 101


def test_other_reductions_and_shapes_are_refused():
    hidden_states, weight, targets = problem()
    with pytest.raises(ValueError, match="expected reduction 'mean' or 'sum', found 'none'"):
        linear_cross_entropy(hidden_states, weight, targets, reduction="none")
    with pytest.raises(ValueError, match=r"expected targets of shape \(50,\), found \(49,\)"):
        linear_cross_entropy(hidden_states, weight, targets[1:])


def test_the_weight_gradient_of_a_chunk_does_not_overflow_in_fp16():
    hidden_states = torch.full((700, 8), 120.0, requires_grad=True)
    weight = torch.zeros(101, 8, requires_grad=True)
    targets = torch.zeros(700, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden_states, weight, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight)
    # d loss / d weight[0] = 700 · (1/101 - 1) · 120, beyond the 65,504 of fp16.
    torch.testing.assert_close(gradient[0], torch.full((8,), 700 * (1 / 101 - 1) * 120), rtol=2e-3, atol=0)


@pytest.mark.skipif(module.triton is None, reason="needs the package triton")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_without_a_gpu(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    types = {
        "logits": "*bf16",
        "targets": "*i64",
        "counted": "*i1",
        "losses": "*fp32",
        "columns": "i32",
        "vocab_size": "i32",
    }
    types |= {"label_smoothing": "fp32", "z_loss": "fp32", "block": "constexpr"}
    source = ASTSource(JITFunction(module._softmax_kernel.fn), types, constexprs={(8,): module._ROW_BLOCK})
    compiled = module.triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
    assert compiled.asm["cubin"]
