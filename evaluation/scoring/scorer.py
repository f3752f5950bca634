"""Scores of items under any causal language model.

The prefix that the requests of an item share (the context, and the common beginning of the continuations) is read once,
and its keys and values are reused. Items are sorted by length and batched by a budget of tokens, which is halved on
out-of-memory. Logits are computed for scored positions only. None of this changes scores beyond rounding.

Memory: keys and values of at most `tokens_per_batch` tokens, and logits of an eighth as many positions or of 2,048 (of
a complete sequence if the model's cache does not keep every token).
"""

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from common.cli_errors import InputError
from common.ranks import Ranks
from evaluation.scoring.forward_passes import TOKENS_PER_SCORED_TOKEN, ForwardPasses, n_positions_of
from evaluation.tasks.encoding import common_prefix_length
from evaluation.tasks.task_types import Generated, Generation, Ids, Item, Request
from gpt2_scratch.generate import causal_logits, logits_differ

Scores = list[Any]  # a `LogLikelihood` or `Generated` for each request of an item

_TOKENS_PER_BATCH = 4_096  # fits the caches of a CPU
_DEFAULT_TOKENS_PER_BATCH = 16_384
_CHECKED_TOKENS = 8


def score(model: Any, items: Sequence[Item], **options: Any) -> list[Scores]:
    """Return the scores of every item, in the order of `items`; arguments and errors as of `score_batches`."""
    scores = dict(pair for batch in score_batches(model, items, **options) for pair in batch)
    return [scores[index] for index in range(len(items))]


def score_batches(
    model: Any,
    items: Sequence[Item],
    *,
    accelerator: Any = None,
    tokens_per_batch: int | None = None,
    share_prefixes: bool = True,
) -> Generator[list[tuple[int, Scores]], None, None]:
    """Yield the scores of items as (index in `items`, scores), a batch of all processes at a time, longest items first.

    Every process gets the same batches. The model is in evaluation mode until the iterator is exhausted or closed.

    Args:
        model: any causal language model of transformers, on its device, unwrapped.
        accelerator: distributes the items over its processes; None for this process only.
        tokens_per_batch: maximum tokens per forward pass, padding and cached tokens included (default: 4,096 on a CPU,
            16,384 otherwise; halved on out-of-memory).
        share_prefixes: read what the requests of an item have in common once.

    Raises:
        InputError: on every process, if the model is not causal, returns NaN or a probability of 0, lacks tokens of
            the tokenizer, or has too few positions for an item.
    """
    n_positions = n_positions_of(model)
    check_items(items, n_positions=n_positions, vocab_size=model.get_input_embeddings().weight.shape[0])
    if not items:
        return
    if tokens_per_batch is None:
        tokens_per_batch = _TOKENS_PER_BATCH if model.device.type == "cpu" else _DEFAULT_TOKENS_PER_BATCH
    world_size, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    ranks = Ranks(gather_object if world_size > 1 else None)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        passes = ForwardPasses(model)
        first = items[0].requests[0]
        text = (first.ids if isinstance(first, Request) else first.context)[:n_positions]
        check_positions = share_prefixes and passes.can_share_prefixes
        share_prefixes = _takes_positions_from_zero(model, text, check_positions=check_positions)
        jobs = [_job(index, item, n_positions, share_prefixes) for index, item in enumerate(items)]
        # The longest first, so that out-of-memory occurs at the start.
        jobs.sort(key=lambda job: (*job.kind, job.prefix or job.length, job.length), reverse=True)
        pending = jobs[rank::world_size]
        while True:
            with ranks.share_errors():
                done, pending, tokens_per_batch = _next_batch(passes, model, pending, tokens_per_batch)
            results = ranks.gather((done, len(pending)))
            yield [pair for pairs, _ in results for pair in pairs]
            if not any(left for _, left in results):
                return
    finally:
        for module in in_training:
            module.training = True


@dataclass(frozen=True)
class _Job:
    """An item to score."""

    index: int
    item: Item
    requests: Sequence[Any]  # truncated to the model's positions
    length: int  # tokens of its longest request
    prefix: int = 0  # tokens that its requests share, if these are read once
    new_tokens: int = 0  # of generations; the same in a batch, because contexts are truncated by it

    @property
    def kind(self) -> tuple[int, bool]:
        """Return a key that is the same for all jobs of a batch."""
        return self.new_tokens, self.prefix > 0

    @property
    def scored_in_prefix(self) -> int:
        """Return how many positions of the shared prefix need logits."""
        return max(1, self.prefix - min(len(request.context) for request in self.requests) + 1) if self.prefix else 0


def _job(index: int, item: Item, n_positions: int, share_prefixes: bool) -> _Job:
    new_tokens = max((each.max_new_tokens for each in item.requests if isinstance(each, Generation)), default=0)
    requests: list[Any] = []
    for request in item.requests:
        # The last token of a continuation is not read, so one more fits than there are positions.
        read = new_tokens if isinstance(request, Generation) else len(request.continuation) - 1
        requests.append(replace(request, context=request.context[read - n_positions :]))
    if new_tokens:
        return _Job(index, item, requests, max(len(each.context) for each in requests) + new_tokens, 0, new_tokens)
    prefix = common_prefix_length([each.ids[:-1] for each in requests])
    is_shared = share_prefixes and len(requests) > 1 and prefix > 1
    return _Job(index, item, requests, max(len(each.ids) for each in requests) - 1, prefix if is_shared else 0)


def _next_batch(
    passes: ForwardPasses, model: Any, pending: list[_Job], budget: int
) -> tuple[list[tuple[int, Scores]], list[_Job], int]:
    """Return the next batch's scores by item, the jobs that remain, and the budget that memory allows."""
    while pending:
        batch = _take(pending, budget)
        try:
            return _run(passes, model, batch, budget), pending[len(batch) :], budget
        except (RuntimeError, MemoryError) as error:
            smallest = len(batch) == 1 and budget < batch[0].length
            if smallest or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
        budget = max(1, budget // 2)
        clear_device_cache(garbage_collection=True)
    return [], [], budget


def _take(pending: list[_Job], budget: int) -> list[_Job]:
    """Return as many of the first jobs, all of one kind, as memory allows; at least one."""
    batch: list[_Job] = []
    tokens = scored = 0
    for job in pending:
        # What a batch keeps: the prefixes' keys and values, or scores. A pass may be smaller than a batch.
        tokens += pending[0].prefix or len(job.item.requests) * job.length
        scored += job.scored_in_prefix
        too_much = tokens > budget or scored * TOKENS_PER_SCORED_TOKEN > budget
        if batch and (too_much or job.kind != batch[0].kind):
            break
        batch.append(job)
    return batch


def _run(passes: ForwardPasses, model: Any, batch: list[_Job], budget: int) -> list[tuple[int, Scores]]:
    """Return the scores of a batch by item."""
    requests = [request for job in batch for request in job.requests]
    scores: Sequence[Any]
    if batch[0].new_tokens:
        scores = _generate(model, requests, batch[0].new_tokens)
    elif batch[0].prefix:
        scores = passes.shared([job.requests for job in batch], [job.prefix for job in batch], budget)
    else:
        scores = passes.separate(requests, budget)
    remaining = iter(scores)
    found = [(job.index, [next(remaining) for _ in job.requests]) for job in batch]
    for job, (_, answers) in zip(batch, found, strict=True):
        sums = [math.nan if answer is None else getattr(answer, "sum", 0.0) for answer in answers]
        if not all(map(math.isfinite, sums)):
            what = "NaN" if any(map(math.isnan, sums)) else "a probability of 0"
            raise InputError(
                f"the model returned {what} at item {job.item.index}; check its weights, or load it in float32"
            )
    return found


@torch.inference_mode()
def _generate(model: Any, requests: Sequence[Generation], new_tokens: int) -> list[Generated | None]:
    """Return greedy continuations without end-of-sequence tokens, from one pass over `new_tokens`; None for NaN.

    Of the model's own generation config (penalties, suppressed tokens, …) only the end-of-sequence tokens count.
    """
    rows = [list(request.context) for request in requests]
    width = max(map(len, rows))
    config = model.config.get_text_config()
    own_padding = getattr(config, "pad_token_id", None)
    padding = own_padding if own_padding is not None and 0 <= own_padding < config.vocab_size else 0  # masked
    device = model.get_input_embeddings().weight.device
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    is_nan = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def check_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
        is_nan.logical_or_(scores.isnan().any(-1))
        return scores

    own_config = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own_config.eos_token_id, pad_token_id=padding)
    try:
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            logits_processor=LogitsProcessorList([check_nan]),
        )
    finally:
        model.generation_config = own_config
    eos = own_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    continuations: list[Generated | None] = []
    for request, ids, failed in zip(requests, output[:, width:].tolist(), is_nan.tolist(), strict=True):
        new = tuple(itertools.takewhile(lambda token: token not in eos_ids, ids[: request.max_new_tokens]))
        continuations.append(None if failed else Generated(new))
    return continuations


def check_items(items: Sequence[Item], *, n_positions: int, vocab_size: int) -> None:
    """Raise an `InputError` for items that a model of this size cannot read, before anything is computed."""
    for item in items:
        for request in item.requests:
            if isinstance(request, Generation):
                ids, needed = request.context, request.max_new_tokens + 1
            else:
                ids, needed = request.ids, len(request.continuation)
            # Tasks truncate what does not fit, possibly to nothing.
            if needed > n_positions or not request.context or not needed:
                raise InputError(
                    f"item {item.index} needs {max(needed, n_positions + 1):,} tokens, but the model has "
                    f"{n_positions:,} positions; use a model with more positions, or omit the task"
                )
            if max(ids) >= vocab_size:
                raise InputError(
                    f"item {item.index} has token id {max(ids):,}, but the model's vocabulary size is {vocab_size:,}; "
                    "use the tokenizer that the model was trained with"
                )


@torch.inference_mode()
def _takes_positions_from_zero(model: Any, ids: Ids, *, check_positions: bool) -> bool:
    """Return whether `position_ids` of 0, 1, … match the model's default; RoBERTa's start after the pad token.

    The first tokens of `ids` are read. `check_positions=False` only checks that the model is causal, and returns False.

    Raises:
        InputError: the model is not causal.
    """
    text = ids[:_CHECKED_TOKENS]
    # The same text with another last token, if there is a different one.
    other = next((token for token in reversed(ids) if token != text[-1]), text[-1])
    rows = torch.tensor([text, (*text[:-1], other)], device=model.get_input_embeddings().weight.device)
    logits = causal_logits(model, rows)  # NaN is reported with its item, later
    if not check_positions:
        return False
    positions = torch.arange(rows.shape[1], device=rows.device)[None]
    return not logits_differ(logits[:1], model(input_ids=rows[:1], position_ids=positions, use_cache=False).logits)
