"""What a GPT-2 computes for a text: probabilities, attention, logit lens; and sampling that two users can share.

Functions that take token ids, of shape (1, seq), cost one forward pass. Tensors for the page are float32 on the CPU.
All works with `GPT2ScratchForCausalLM` and `transformers.GPT2LMHeadModel`. This file imports nothing of ours, because a
Space carries it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

_MODEL_TYPES = ("gpt2", "gpt2_scratch")


class Predictions(NamedTuple):
    """The model's prediction after each token of a text. Row t is about token t + 1."""

    probabilities: Tensor  # (seq - 1,), of the token that follows in the text
    ranks: Tensor  # (seq - 1,), of the token that follows; 1 for the likeliest
    top_ids: Tensor  # (seq, top), the likeliest tokens, best first
    top_probabilities: Tensor  # (seq, top)


def prepare(model: Any) -> Any:
    """Return the model, set to an attention implementation that has weights to show.

    Raises:
        ValueError: it is not a GPT-2 with a language-modeling head.
    """
    model_type = model.config.model_type
    if model_type not in _MODEL_TYPES or model.get_output_embeddings() is None:
        raise ValueError(f"the demo shows GPT-2 language models; {type(model).__name__} is of type {model_type}")
    model.set_attn_implementation("eager")
    return model.eval()


def prompt_ids(tokenizer: Any, prompt: str, n_positions: int | None, vocab_size: int) -> Tensor:
    """Return the prompt's token ids, (1, seq). An empty prompt becomes the end-of-text token, which starts a document.

    Raises:
        ValueError: the prompt fills the model's positions, or the tokenizer does not belong to the model.
    """
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError("the prompt is empty and the tokenizer has no end-of-text token; write a prompt")
        ids = [start]
    if n_positions is not None and len(ids) >= n_positions:
        raise ValueError(
            f"a prompt of {len(ids):,} tokens leaves no room in the model's {n_positions:,} positions; shorten it"
        )
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer gives the id {max(ids):,}, but the model's vocabulary has {vocab_size:,} tokens; use the "
            "tokenizer that belongs to the model"
        )
    return torch.tensor([ids])


def sample_tokens(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the ids of new tokens after `input_ids`, (1, seq), up to the end-of-text token or the last position.

    They are those of `model.generate` after `torch.manual_seed(seed)`. Unlike `generate`, this does not draw from the
    global random generator, which concurrent users would share. A temperature of 0 is greedy decoding.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    warpers = LogitsProcessorList()
    if temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
        warpers.extend([TopKLogitsWarper(top_k)] if top_k > 0 else [])
        warpers.extend([TopPLogitsWarper(float(top_p))] if top_p < 1 else [])
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or ())
    new_ids = input_ids.to(model.device)
    cache: dict[str, Any] = {}
    room = model.config.max_position_embeddings - input_ids.shape[1]
    for _ in range(min(max_new_tokens, room)):
        with torch.inference_mode():
            output = model(new_ids, use_cache=True, logits_to_keep=1, **cache)
            # "past_key_values" before transformers 5.24, and a second name since
            name = "cache" if "cache" in output else "past_key_values"
            cache = {name: output[name]}
            scores = warpers(input_ids, output.logits[:, -1].float())  # (1, vocab_size)
            if temperature > 0:
                new_ids = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
            else:
                new_ids = scores.argmax(dim=-1, keepdim=True)
        token = int(new_ids)
        yield token
        if token in ends:
            return


@torch.inference_mode()
def predictions(model: Any, input_ids: Tensor, *, top: int = 10) -> Predictions:
    """Return the probability of every token after those before it, and the `top` likeliest tokens of each position.

    These are the model's own probabilities: neither temperature nor top-k nor top-p changes them.
    """
    logits = model(input_ids.to(model.device), use_cache=False).logits[0].float().cpu()  # (seq, vocab_size)
    probabilities = logits.softmax(dim=-1)
    following = input_ids[0, 1:, None].cpu()
    of_following = probabilities[:-1].gather(1, following)  # (seq - 1, 1)
    ranks = (probabilities[:-1] > of_following).sum(dim=-1) + 1
    best = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
    return Predictions(of_following[:, 0], ranks, best.indices, best.values)


@torch.inference_mode()
def layers(model: Any, input_ids: Tensor) -> Any:
    """Return the output of the model without its head, with attention weights and hidden states of every layer.

    Raises:
        ValueError: the attention implementation has no weights; see `prepare`.
    """
    output = model.base_model(
        input_ids.to(model.device), use_cache=False, output_attentions=True, output_hidden_states=True
    )
    if not output.attentions or output.attentions[0] is None:
        raise ValueError('attention weights need model.set_attn_implementation("eager")')
    return output


def attention(computed: Any, layer: int) -> Tensor:
    """Return a layer's attention weights, (n_head, seq, seq), from `layers`; rows attend to columns, and sum to 1."""
    return computed.attentions[layer][0].float().cpu()


@torch.inference_mode()
def logit_lens(model: Any, computed: Any, positions: slice) -> Tensor:
    """Return what each layer would predict, as probabilities (n_layer + 1, positions, vocab_size), from `layers`.

    The final LayerNorm and the head are applied to the residual stream after the embedding (row 0) and after every
    block. The last row is the model's own prediction. From "interpreting GPT: the logit lens" (nostalgebraist 2020).
    """
    *streams, last = (hidden_states[0, positions] for hidden_states in computed.hidden_states)
    # transformers returns the last one after ln_f.
    normalized = torch.stack([*(model.base_model.ln_f(stream) for stream in streams), last])
    return model.get_output_embeddings()(normalized).float().softmax(dim=-1).cpu()
