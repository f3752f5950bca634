"""Which parameters have weight decay."""

from training.optim.optimizer import decay_groups


def test_matrices_and_embeddings_decay_and_biases_and_norms_do_not() -> None:
    from gpt2_scratch import GPT2ScratchConfig, GPT2ScratchForCausalLM

    model = GPT2ScratchForCausalLM(GPT2ScratchConfig(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    decaying, other = decay_groups(model, 0.1)
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name.removeprefix("transformer.") for name, parameter in model.named_parameters()}
    assert {names[p] for p in decaying["params"]} == {  # type: ignore[attr-defined]
        *("wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"),
        *("h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"),
    }
    assert {names[p] for p in other["params"]} == {  # type: ignore[attr-defined]
        *("h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.ln_2.weight", "h.0.ln_2.bias", "ln_f.weight", "ln_f.bias"),
        *("h.0.attn.c_attn.bias", "h.0.attn.c_proj.bias", "h.0.mlp.c_fc.bias", "h.0.mlp.c_proj.bias"),
    }
