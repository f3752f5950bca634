"""torch.compile: one graph, the same values, no recompilation for other lengths."""

import pytest
import torch
from support.tiny_models import gradients, one_thread, tiny, tokens  # noqa: F401 - a fixture for all
from torch._dynamo.testing import CompileCounter

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Inductor uses a deprecated part of torch.jit.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_model_compiles_to_one_graph_forward_and_backward():
    model = tiny(n_layer=1, attn_implementation="sdpa").train()
    compiled = torch.compile(model, fullgraph=True)
    input_ids = tokens()
    found = []
    for function in (model, compiled):
        model.zero_grad()
        loss = function(input_ids, shift_labels=input_ids.roll(-1, 1), use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_attention_gets_a_mask_only_with_position_ids(packed):
    seen = []

    def watch(graph, _):
        attention = torch.nn.functional.scaled_dot_product_attention
        seen.extend(node.kwargs for node in graph.graph.nodes if node.target is attention)
        return graph.forward

    compiled = torch.compile(tiny(attn_implementation="sdpa"), fullgraph=True, backend=watch)
    positions = {"position_ids": torch.arange(20).unsqueeze(0) % 11} if packed else {}
    compiled(tokens(), use_cache=False, **positions)
    assert [call["is_causal"] for call in seen] == [not packed] * 3
    assert [call["attn_mask"] is None for call in seen] == [not packed] * 3


def test_lengths_marked_dynamic_compile_once():
    model = tiny(attn_implementation="sdpa")
    # Recompilation shows in tracing; generating CPU code would only take time.
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch, seq in ((2, 20), (3, 13), (5, 48), (4, 2)):
            input_ids = tokens(batch, seq)
            mask = torch.ones_like(input_ids)
            mask[0, : seq // 2] = 0
            found = compiled(input_ids, attention_mask=mask, use_cache=False).logits
            assert torch.equal(found, model(input_ids, attention_mask=mask, use_cache=False).logits)
    assert counter.frame_count == 1


def test_unmarked_lengths_compile_at_most_twice():
    model = tiny(n_layer=1, attn_implementation="sdpa")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seq in (20, 13, 31, 48, 2):
            compiled(tokens(2, seq), shift_labels=tokens(2, seq), use_cache=False)
    assert counter.frame_count == 2


def test_state_dict_of_a_compiled_model_saves_and_loads(tmp_path):
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    compiled.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_compiled_model_refuses_a_sequence_that_is_too_long():
    compiled = torch.compile(tiny(n_layer=1, attn_implementation="sdpa"), backend="eager", dynamic=True)
    with torch.no_grad():
        compiled(tokens(), use_cache=False)
        with pytest.raises(ValueError, match="sequence of 49 tokens exceeds n_positions=48"):
            compiled(tokens(2, 49), use_cache=False)


def test_model_exports_to_a_graph():
    model = tiny(n_layer=1, attn_implementation="sdpa")
    exported = torch.export.export(model, (), {"input_ids": tokens(), "use_cache": False}, strict=False)
    found = exported.module()(input_ids=tokens(seed=4), use_cache=False)
    assert torch.equal(found.logits, model(tokens(seed=4)).logits)
