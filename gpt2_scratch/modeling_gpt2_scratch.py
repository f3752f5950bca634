"""GPT-2, written by hand and read from top to bottom: attention, MLP, block, model, language model.

The architecture is that of "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019): token and
position embeddings are added, `n_layer` blocks of attention and MLP each add their result to that stream, and the
normalised stream is compared with every token embedding to score the next token.

Parameters have the names and layouts of the official checkpoints (`Conv1D` keeps weights as (in, out)), and operations
stand in the order of `transformers.GPT2LMHeadModel`, so logits and gradients are equal bit for bit in fp32.

Initial weights are drawn in `pretrained_gpt2_scratch.py`, by `_init_weights`.

What it costs: a token takes about 2 FLOPs per parameter forward and 4 backward, and attention another
12 * n_layer * n_embd * seq in all. A key-value cache holds 2 * n_layer * n_embd numbers per token.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .linear_cross_entropy import linear_cross_entropy
from .pretrained_gpt2_scratch import (
    CACHE_NAME,
    GPT2ScratchPreTrainedModel,
    check_arguments,
    check_dimensions,
    check_ids,
    residual_projection,
    the_one_cache,
    too_long,
)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return softmax(Q Kᵀ · scaling + mask) V, and the attention weights.

    This is the definition, and holds (seq, key_seq) weights per head; `sdpa` and `flash_attention_2` do not.

    Arguments:
        module: the attention layer, asked only whether it is training.
        query: (batch, n_head, seq, head_dim).
        key: (batch, n_head, key_seq, head_dim), where key_seq counts cached tokens too.
        value: (batch, n_head, key_seq, head_dim).
        attention_mask: (batch or 1, 1, seq, key_seq), 0 where a query may look and very negative where not.
        scaling: factor of the scores, 1 / sqrt(head_dim) in GPT-2.
        dropout: probability that a weight is dropped in training.
        kwargs: what other implementations need.

    Returns:
        (batch, seq, n_head, head_dim) and (batch, n_head, seq, key_seq).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (batch, n_head, seq, key_seq)
    if attention_mask is not None:
        scores = scores + attention_mask
    # Autocast computes the softmax in fp32: back to the values' dtype before the second product.
    weights = F.softmax(scores, dim=-1).type(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GPT2ScratchAttention(nn.Module):
    """Multi-head causal self-attention: every token gathers from itself and the tokens before it."""

    def __init__(self, config: GPT2ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        # Fast implementations receive no mask when nothing is padded, and ask the layer instead.
        self.is_causal = True

        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = residual_projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what attention adds to the stream (batch, seq, n_embd), and its weights when eager.

        Arguments:
            hidden_states: (batch, seq, n_embd), normalised.
            cache: keys and values of earlier tokens; those of this call are added to it.
            attention_mask: as `create_causal_mask` makes it for the implementation in use.
            kwargs: passed to the implementation.
        """
        batch, seq, n_embd = hidden_states.shape
        query, key, value = (
            part.view(batch, seq, -1, self.head_dim).transpose(1, 2)  # (batch, n_head, seq, head_dim)
            for part in self.c_attn(hidden_states).split(n_embd, dim=2)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attn_pdrop if self.training else 0.0
        # `scaling` and `dropout` stand here by name: vLLM looks for them in this call's source.
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        # Conv1D views its input as rows; a kernel is free to return a layout in which that is no view.
        attended = attended.reshape(batch, seq, n_embd).contiguous()
        return self.resid_dropout(self.c_proj(attended)), weights


class GPT2ScratchMLP(nn.Module):
    """Two affine layers with a GELU between them, applied to every token by itself."""

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__()
        n_inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = residual_projection(n_inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return what the MLP adds to the stream, (batch, seq, n_embd), from the normalised stream of that shape."""
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ScratchBlock(GradientCheckpointingLayer):
    """One layer: attention, then MLP. Each reads a normalised copy of the stream and adds to the stream itself."""

    def __init__(self, config: GPT2ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ScratchAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ScratchMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the stream after this block, (batch, seq, n_embd); `kwargs` are the attention's."""
        hidden_states = self.attn(self.ln_1(hidden_states), **kwargs)[0] + hidden_states
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ScratchModel(GPT2ScratchPreTrainedModel):
    """GPT-2 without its head: token ids in, one vector per token out."""

    _can_record_outputs = {  # noqa: RUF012 - the base class reads a plain dict
        "hidden_states": GPT2ScratchBlock,
        "attentions": OutputRecorder(GPT2ScratchAttention, index=1),
    }

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2ScratchBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.wte = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the final hidden states (batch, seq, n_embd), and the cache when it is used.

        Arguments:
            input_ids: (batch, seq) token ids, those after the cached ones.
            past_key_values: the cache of the tokens before these, by its name before transformers 5.24.
            attention_mask: (batch, cached + seq), 1 for tokens and 0 for padding on either side.
            position_ids: (batch, seq), counted on from the cache when None; left padding needs them.
            inputs_embeds: (batch, seq, n_embd) instead of `input_ids`.
            use_cache: whether to return a cache; the configuration's `use_cache` when None.
            cache: the same as `past_key_values`, by its name since transformers 5.24.
            kwargs: `output_hidden_states` and `output_attentions` are recorded as the blocks run;
                `ATTENTION_ARGUMENTS` go to the attention implementation.

        Raises:
            TypeError: an argument that is not listed here, because nothing would read it.
            ValueError: when not exactly one of `input_ids` and `inputs_embeds` is given, the cache is given under both
                its names, the sequence is longer than n_positions, or, on a CPU, an id is outside its range.
        """
        kwargs = check_arguments(type(self), kwargs)
        cache = the_one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            found = "neither" if input_ids is None else "both"
            raise ValueError(f"expected either input_ids or inputs_embeds, found {found}; pass exactly one")
        check_dimensions(input_ids=(input_ids, "batch, seq"), inputs_embeds=(inputs_embeds, "batch, seq, n_embd"))
        if inputs_embeds is None:
            assert input_ids is not None
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            check_ids("input_ids", input_ids, self.config.vocab_size)
            inputs_embeds = self.wte(input_ids)

        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "expected no cache with activation checkpointing in training, found some; give the whole "
                    "sequence, or turn off one of the two"
                )
            # The blocks run a second time in the backward pass and would enter their keys twice.
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        past_seq = 0 if cache is None else cache.get_seq_length()
        self._check_length(past_seq, inputs_embeds.shape[1], position_ids)
        # Without padding, cache or packed documents (only positions that the caller gave can be theirs) sdpa needs no
        # mask and is faster for it; in a traced graph `create_causal_mask` could not rule them out, and would make one.
        special = any(argument is not None for argument in (attention_mask, cache, position_ids))
        causal_mask = None
        if special or self.config._attn_implementation != "sdpa":
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
            )

        if position_ids is None:
            positions = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seq).unsqueeze(0)
        else:
            check_ids("position_ids", position_ids, self.config.n_positions)
            positions = position_ids
        hidden_states = self.drop(inputs_embeds + self.wpe(positions))  # (batch, seq, n_embd)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                cache=cache,
                attention_mask=causal_mask,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), **{CACHE_NAME: cache if use_cache else None}
        )

    def _check_length(self, past_seq: int | Tensor, seq: int, position_ids: Tensor | None) -> None:
        """Refuse what the position embedding has no rows for, before it fails with a bare IndexError.

        A static cache counts in a tensor, which cannot be looked at inside a compiled graph. Positions may be given
        that start anew for every packed document, and then the sequence may be longer than any of them.
        """
        compiling = torch.compiler.is_compiling()
        if isinstance(past_seq, Tensor):
            past_seq = 0 if compiling else int(past_seq)
        length, n_positions = past_seq + seq, self.config.n_positions
        if length <= n_positions:
            return
        if position_ids is None or (not compiling and bool(position_ids.max() >= n_positions)):
            # A length inside a compiled graph may be a symbol, which cannot be printed.
            raise too_long(None if compiling else length, n_positions)


class GPT2ScratchForCausalLM(GPT2ScratchPreTrainedModel, GenerationMixin):
    """GPT-2 with its head: the score of every token of the vocabulary as the next one, and the training loss."""

    # The head is the token embedding itself (Press & Wolf 2017).
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2ScratchModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() looks for its arguments by name
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of the next step, and refuse positions that a compiled step could not look at."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        length = 0 if inputs.get("position_ids") is None else int(inputs["position_ids"].max()) + 1
        if length > self.config.n_positions:
            raise too_long(length, self.config.n_positions)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (batch, seq, vocab_size), or in training with `shift_labels` the loss alone.

        Arguments:
            input_ids: as for `GPT2ScratchModel`, like all arguments that are not listed here.
            labels: (batch, seq) the tokens themselves; shifted by one here. -100 is ignored.
            num_items_in_batch: number of targets that the summed loss is divided by, the mean over the targets that
                are not ignored when None. A tensor, because under compile every new int costs a recompilation.
            logits_to_keep: logits of only the last so many tokens, or of these positions; 0 for all.
            kwargs: `shift_labels`, (batch, seq) targets that are shifted already: `shift_labels[:, t]` follows
                `input_ids[:, t]`. Where we differ from Hugging Face: alone, without `labels`, they give the loss
                without the logits being formed as a whole, and `logits` is None. It has no place among the named
                arguments because Trainer would evaluate only batches with every label that is named there. Another
                `ignore_index` than -100. The rest goes to `GPT2ScratchModel`.

        Raises:
            TypeError, ValueError: as for `GPT2ScratchModel`; on a CPU also when a label is not a token id.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        ignore_index: int = kwargs.pop("ignore_index", -100)
        targets = labels if shift_labels is None else shift_labels
        if targets is not None:
            check_ids("labels", targets.masked_fill(targets == ignore_index, 0), self.config.vocab_size)
        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (batch, seq, n_embd)

        loss, logits = None, None
        if shift_labels is not None and labels is None:
            reduction = "mean" if num_items_in_batch is None else "sum"
            loss = linear_cross_entropy(
                hidden_states, self.lm_head.weight, shift_labels, ignore_index=ignore_index, reduction=reduction
            )
            if num_items_in_batch is not None:
                loss = loss / num_items_in_batch
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept, :])  # (batch, kept, vocab_size)
            if labels is not None:
                loss = self.loss_function(
                    logits,
                    labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=shift_labels,
                    ignore_index=ignore_index,
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )


class GPT2ScratchForSequenceClassification(GenericForSequenceClassification, GPT2ScratchPreTrainedModel):
    """GPT-2 with a classifier on the last token of each sequence, for fine-tuning.

    The forward pass is the one that Hugging Face's classifiers share: logits (batch, num_labels) at the last token that
    is not `pad_token_id`, and a loss by the kind of labels.
    """

    base_model_prefix = "transformer"
    new_head_prefix = "score."

    def __init__(self, config: GPT2ScratchConfig) -> None:
        # The shared class would build the base model through AutoModel, which asks for trust in remote code again.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = GPT2ScratchModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()
