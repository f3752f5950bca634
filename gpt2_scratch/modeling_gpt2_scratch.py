"""GPT-2: attention, MLP, block, model, language model.

The architecture is that of "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019). Token and
position embeddings are added. Each of `n_layer` blocks adds the output of its attention and of its MLP to that residual
stream. The normalized stream is multiplied with every token embedding, which gives the logits of the next token.

Parameters have the names and layouts of the official checkpoints (`Conv1D` stores weights as (in, out)). Operations run
in the order of `transformers.GPT2LMHeadModel`, so logits and gradients match it bit for bit in fp32. Initialization,
loading and input checks are in `pretrained_gpt2_scratch.py`.

Cost per token: 2 FLOPs per parameter in the forward pass and 4 in the backward pass, plus 12 * n_layer * n_embd * seq
for attention in both. A key-value cache holds 2 * n_layer * n_embd numbers per token.
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
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_gpt2_scratch import GPT2ScratchConfig
from .heads_gpt2_scratch import GPT2ScratchForSequenceClassification  # noqa: F401 - a saved folder carries the heads too
from .linear_cross_entropy import linear_cross_entropy
from .pretrained_gpt2_scratch import (
    CACHE_NAME,
    GPT2ScratchPreTrainedModel,
    check_arguments,
    check_inputs,
    check_range,
    mask_cache,
    sequence_too_long,
    single_cache,
    update_cache,
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
    """Return softmax(Q Kᵀ · scaling + mask) V as (batch, seq, n_head, head_dim), and the attention weights.

    The weights, (batch, n_head, seq, key_seq), are held in memory; `sdpa` and `flash_attention_2` avoid that.

    Args:
        module: the attention layer.
        query: (batch, n_head, seq, head_dim).
        key: (batch, n_head, key_seq, head_dim); key_seq includes cached tokens.
        value: (batch, n_head, key_seq, head_dim).
        attention_mask: (batch or 1, 1, seq, key_seq), added to the scores: 0 to attend, very negative to ignore.
        scaling: factor of the scores, 1 / sqrt(head_dim) in GPT-2.
        dropout: dropout probability of the weights.
        kwargs: arguments of other implementations; ignored.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (batch, n_head, seq, key_seq)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1).type(value.dtype)  # autocast computes the softmax in fp32
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class GPT2ScratchAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPT2ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        self.is_causal = True  # read by implementations that get no mask
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.is_residual_projection = True  # initialized smaller, see `_init_weights`
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output (batch, seq, n_embd), and the attention weights if the implementation has them.

        Args:
            hidden_states: (batch, seq, n_embd), normalized.
            cache: keys and values of earlier tokens; those of this call are appended.
            attention_mask: from `create_causal_mask`, in the form that the implementation takes.
            kwargs: further arguments of the implementation.
        """
        batch, seq, n_embd = hidden_states.shape
        query, key, value = (
            part.view(batch, seq, -1, self.head_dim).transpose(1, 2)  # (batch, n_head, seq, head_dim)
            for part in self.c_attn(hidden_states).split(n_embd, dim=2)
        )
        key, value = update_cache(cache, key, value, self.layer_idx, kwargs)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attn_pdrop if self.training else 0.0
        # vLLM searches the source of this call for `scaling=` and `dropout=`.
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        # Some kernels return a layout that Conv1D cannot view as rows.
        attended = attended.reshape(batch, seq, n_embd).contiguous()
        return self.resid_dropout(self.c_proj(attended)), weights


class GPT2ScratchMLP(nn.Module):
    """Two affine layers with a GELU in between, applied to each token."""

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__()
        n_inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = Conv1D(n_inner, config.n_embd)
        self.act = ACT2FN[config.activation_function]
        self.c_proj = Conv1D(config.n_embd, n_inner)
        self.c_proj.is_residual_projection = True
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the MLP output (batch, seq, n_embd) for normalized `hidden_states` of the same shape."""
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2ScratchBlock(GradientCheckpointingLayer):
    """One layer: attention, then MLP. Each reads the normalized residual stream and adds its output to the stream."""

    def __init__(self, config: GPT2ScratchConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2ScratchAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2ScratchMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Return the residual stream after this block, (batch, seq, n_embd); `kwargs` go to the attention."""
        hidden_states = self.attn(self.ln_1(hidden_states), **kwargs)[0] + hidden_states
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2ScratchModel(GPT2ScratchPreTrainedModel):
    """GPT-2 without a head: from token ids to one vector per token."""

    _input_embed_layer = "wte"
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
        """Return the final hidden states (batch, seq, n_embd), and the cache if it is used.

        Args:
            input_ids: (batch, seq) token ids, without the cached ones.
            past_key_values: the cache, under its name before transformers 5.24.
            attention_mask: (batch, cached + seq), 1 for tokens and 0 for padding on either side.
            position_ids: (batch, seq); default: consecutive, starting after the cache. Left padding needs them.
            inputs_embeds: (batch, seq, n_embd), in place of `input_ids`.
            use_cache: return a cache; default: the config's `use_cache`.
            cache: the cache, under its name since transformers 5.24.
            kwargs: `output_hidden_states`, `output_attentions`, and the `ATTENTION_ARGUMENTS`.

        Raises:
            TypeError: an argument that nothing reads, see `check_arguments`.
            ValueError: inputs that do not fit the model, see `check_inputs`.
        """
        cache = single_cache(cache, past_key_values)
        check_inputs(self, input_ids, inputs_embeds, attention_mask, position_ids, cache)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # (batch, seq, n_embd)

        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache, cache = False, None  # the backward pass runs the blocks again, which would add their keys twice
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        causal_mask = self._causal_mask(inputs_embeds, attention_mask, position_ids, cache)
        attention_kwargs = check_arguments(self, kwargs, cache, position_ids, causal_mask)

        if position_ids is None:
            past_seq = 0 if cache is None else cache.get_seq_length()
            positions = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seq).unsqueeze(0)
        else:
            positions = position_ids
        hidden_states = self.drop(inputs_embeds + self.wpe(positions))
        for block in self.h:
            hidden_states = block(
                hidden_states,
                cache=cache,
                attention_mask=causal_mask,
                position_ids=position_ids,
                **attention_kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), **{CACHE_NAME: cache if use_cache else None}
        )

    def _causal_mask(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Any:
        """Return the mask in the form that the attention implementation takes; None if it needs none."""
        # Without padding, cache and packed documents (which need position_ids), `sdpa` and `blockwise` are faster with
        # no mask. In a traced graph `create_causal_mask` cannot rule these out and would build a mask.
        plain = attention_mask is None and position_ids is None and cache is None
        if plain and self.config._attn_implementation in ("sdpa", "blockwise"):
            return None
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **mask_cache(cache),
        )


class GPT2ScratchForCausalLM(GPT2ScratchPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modeling head: logits of the next token, and the training loss."""

    # The head is the token embedding (Press & Wolf 2017).
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: GPT2ScratchConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2ScratchModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate() inspects its signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the inputs of the next step; check positions here, because a compiled step cannot."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        length = 0 if inputs.get("position_ids") is None else int(inputs["position_ids"].max()) + 1
        if length > self.config.n_positions:
            raise sequence_too_long(length, self.config.n_positions)
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
        """Return logits (batch, seq, vocab_size) and, with labels, the loss; with `shift_labels` only the loss.

        Args:
            input_ids: as in `GPT2ScratchModel`, like every argument that is not listed here.
            labels: (batch, seq) token ids, shifted here. -100 is ignored.
            num_items_in_batch: divide the summed loss by this number of targets; default: the number of targets that
                are not ignored. Pass a tensor under torch.compile, where each new int causes a recompilation.
            logits_to_keep: compute logits of only the last tokens, that many, or of these positions; 0 for all.
            kwargs: `shift_labels`, (batch, seq): targets that are already shifted, `shift_labels[:, t]` follows
                `input_ids[:, t]`. Unlike in transformers, `shift_labels` without `labels` return the loss and no
                logits, which are never held completely. They are not a named argument because Trainer skips the loss
                of batches that lack a named label. `ignore_index`: default -100.

        Raises:
            TypeError, ValueError: as `GPT2ScratchModel`; on CPU also for a label that is not a token id.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        ignore_index: int = kwargs.pop("ignore_index", -100)
        targets = labels if shift_labels is None else shift_labels
        if targets is not None:
            check_range("labels", targets.masked_fill(targets == ignore_index, 0), self.config.vocab_size)
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
            hidden_states = hidden_states[:, kept, :]
            if targets is not None and targets.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"expected labels of shape {tuple(hidden_states.shape[:2])}, found {tuple(targets.shape)}; give "
                    "one label per position, and leave logits_to_keep out"
                )
            logits = self.lm_head(hidden_states)  # (batch, kept, vocab_size)
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
