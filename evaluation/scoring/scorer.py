"""The log-likelihood of continuations under any causal language model, in as few operations as it takes.

What the requests of an item begin with (the context, and continuations as far as they agree) is computed once; its keys
and values are then repeated for the different endings. Items are sorted by length and batched by a budget of tokens,
which is halved when memory runs out. The head is given the positions that are scored and no others, so the logits of
context and padding are never formed. Answers do not depend on any of this beyond rounding.

Costs: a batch holds keys and values of at most `tokens_per_batch` tokens, and logits of an eighth as many or of
2,048 (of a whole sequence, where a model's cache does not keep every token).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from common.cli_errors import InputError
from evaluation.scoring.forward_passes import TOKENS_PER_SCORED_TOKEN, ForwardPasses, Passage
from evaluation.scoring.model_checks import examine
from evaluation.tasks.context_split import shared_length
from evaluation.tasks.task_types import Generated, Generation, Ids, Item, LogLikelihood, Request

Answers = list[Any]

_TOKENS_PER_BATCH = 4_096  # what a CPU's caches like
_TOKENS_PER_BATCH_ELSEWHERE = 16_384
_POSITIONS_WITHOUT_A_LIMIT = 2048


def score(
    model: Any,
    items: Sequence[Item],
    *,
    accelerator: Any = None,
    tokens_per_batch: int | None = None,
    share_prefixes: bool = True,
    on_result: Callable[[Item, Answers], None] = lambda item, answers: None,
    between_batches: Callable[[], None] = lambda: None,
) -> list[Answers]:
    """Return the answers to every item's requests, in the order of `items`, on every process.

    Args:
        model: any causal language model of transformers, on its device, not wrapped.
        items: of any tasks; those that were finished earlier are simply not passed.
        accelerator: spreads the items over its processes; None for this process alone.
        tokens_per_batch: tokens in a forward pass, padding and cached tokens included; halved when memory runs out.
            4,096 on a CPU and 16,384 elsewhere when None.
        share_prefixes: compute what the requests of an item begin with once.
        on_result: is called on the main process with each item as soon as its batch is done, longest items first.
        between_batches: is called between two batches, on every process equally often; may raise.

    Raises:
        InputError: the model is not causal, gives NaN or a probability of 0, lacks tokens that the tokenizer has, or
            has too few positions for an item.
    """
    n_positions = n_positions_of(model)
    _check(model, items, n_positions)
    if not items:
        return []
    passes = ForwardPasses(model)
    if tokens_per_batch is None:
        tokens_per_batch = _TOKENS_PER_BATCH if model.device.type == "cpu" else _TOKENS_PER_BATCH_ELSEWHERE
    number, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    results: list[Answers | None] = [None] * len(items)

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        share_prefixes = share_prefixes and passes.can_share_prefixes
        share_prefixes = examine(model, _text(items[0])[:n_positions], takes_positions=share_prefixes)
        jobs = [_Job.of(place, item, n_positions, share_prefixes) for place, item in enumerate(items)]
        # Longest first: what does not fit into memory shows at once.
        jobs.sort(key=lambda job: (job.kind, job.new_tokens, job.prefix or job.length, job.length), reverse=True)
        pending = jobs[rank::number]
        while True:
            trouble: str | None = None
            done: list[tuple[int, Answers]] = []
            try:
                done, pending, tokens_per_batch = _next_batch(passes, pending, tokens_per_batch)
            except InputError as error:
                # The other processes wait for this one's answers: they are told instead.
                trouble = str(error)
            everywhere = _gather((trouble, len(pending), done), accelerator)
            for trouble, _, _ in everywhere:
                if trouble:
                    raise InputError(trouble)
            for _, _, finished in everywhere:
                for place, answers in finished:
                    results[place] = answers
                    if rank == 0:
                        on_result(items[place], answers)
            if not any(left for _, left, _ in everywhere):
                break
            between_batches()
    finally:
        for module in training:
            module.training = True
    assert all(answers is not None for answers in results)
    return [answers for answers in results if answers is not None]


def _text(item: Item) -> Ids:
    """Return the tokens of an item's first request."""
    request = item.requests[0]
    return request.context + (request.continuation if isinstance(request, Request) else ())


def n_positions_of(model: Any) -> int:
    """Return the longest sequence that `model` takes, in tokens; 2,048 for one without a limit."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _POSITIONS_WITHOUT_A_LIMIT)


def cut(request: Request, n_positions: int) -> tuple[int, ...]:
    """Return the tokens of `request` without the oldest of its context that do not fit.

    The last token is scored and never read, so one more fits than there are positions.
    """
    return (request.context + request.continuation)[-(n_positions + 1) :]


@dataclasses.dataclass(frozen=True)
class _Job:
    """An item on its way: which tokens are read and scored, and what may be read once for all of its requests."""

    place: int
    item: Item
    kind: str
    passages: tuple[Passage, ...]
    prefix: int

    @classmethod
    def of(cls, place: int, item: Item, n_positions: int, share_prefixes: bool) -> "_Job":
        if isinstance(item.requests[0], Generation):
            return cls(place, item, "generation", (), 0)
        passages = []
        for request in item.requests:
            assert isinstance(request, Request)
            ids = cut(request, n_positions)
            passages.append(Passage(ids, len(ids) - len(request.continuation), request.excluded))
        prefix = shared_length([passage.ids[:-1] for passage in passages]) if share_prefixes else 0
        if len(passages) == 1 or prefix < 2:
            return cls(place, item, "alone", tuple(passages), 0)
        return cls(place, item, "shared", tuple(passages), prefix)

    @property
    def length(self) -> int:
        """Return the tokens of its longest request."""
        if self.kind == "generation":
            return max(len(request.context) + request.max_new_tokens for request in self.item.requests)  # type: ignore[union-attr]
        return max(len(passage.ids) for passage in self.passages) - 1

    @property
    def new_tokens(self) -> int:
        """Return how many tokens are generated: where a long context is cut depends on it, so a batch shares it."""
        return max(
            (request.max_new_tokens for request in self.item.requests if isinstance(request, Generation)), default=0
        )

    @property
    def scored_in_prefix(self) -> int:
        """Return how many positions of what its requests share need logits."""
        return max(1, self.prefix - min(passage.first_scored for passage in self.passages) + 1) if self.prefix else 0


def _next_batch(
    passes: ForwardPasses, pending: list[_Job], budget: int
) -> tuple[list[tuple[int, Answers]], list[_Job], int]:
    """Return the next batch's answers with their items' places, what is left, and the budget that memory allows."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    while pending:
        batch = _take(pending, budget)
        try:
            return _answer(passes, batch, budget), pending[len(batch) :], budget
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
        # What is kept at a time: the prefixes' keys and values, or answers. Passes inside a batch are smaller.
        tokens += pending[0].prefix or len(job.item.requests) * job.length
        scored += job.scored_in_prefix
        too_much = tokens > budget or scored * TOKENS_PER_SCORED_TOKEN > budget
        if batch and (too_much or (job.kind, job.new_tokens) != (batch[0].kind, batch[0].new_tokens)):
            break
        batch.append(job)
    return batch


def _answer(passes: ForwardPasses, batch: list[_Job], budget: int) -> list[tuple[int, Answers]]:
    """Return the answers of a batch, each with its item's place."""
    kind = batch[0].kind
    if kind == "generation":
        asked = [request for job in batch for request in job.item.requests if isinstance(request, Generation)]
        written = passes.generate([request.context for request in asked], batch[0].new_tokens)
        flat: list[Any] = [
            None if ids is None else Generated(ids[: request.max_new_tokens])
            for ids, request in zip(written, asked, strict=True)
        ]
    else:
        passages = [job.passages for job in batch]
        if kind == "shared":
            scores = passes.shared(passages, [job.prefix for job in batch], budget)
        else:
            scores = passes.alone([passage for group in passages for passage in group], budget)
        flat = [LogLikelihood(score.sum, score.tokens, score.greedy) for score in scores]
    answers, start = [], 0
    for job in batch:
        end = start + len(job.item.requests)
        found = flat[start:end]
        sums = [math.nan if answer is None else getattr(answer, "sum", 0.0) for answer in found]
        if not all(map(math.isfinite, sums)):
            raise InputError(
                "expected probabilities above 0 from the model, found "
                f"{'NaN' if any(map(math.isnan, sums)) else 'infinite log-likelihoods'} at item {job.item.index}; look "
                "at its weights, or load it in float32"
            )
        answers.append((job.place, found))
        start = end
    return answers


def _check(model: Any, items: Sequence[Item], n_positions: int) -> None:
    """Refuse what the model cannot read, before anything is computed."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    for item in items:
        for request in item.requests:
            if isinstance(request, Generation):
                ids, needed = request.context, request.max_new_tokens + 1
            else:
                ids, needed = request.context + request.continuation, len(request.continuation)
            # Tasks cut what does not fit, even to nothing.
            if needed > n_positions or not request.context or not needed:
                raise InputError(
                    f"expected items of at most {n_positions:,} tokens (the model's positions), found one that needs "
                    f"{max(needed, n_positions + 1):,} at item {item.index}; take a model with more positions, or "
                    "leave out the task"
                )
            if max(ids) >= vocab_size:
                raise InputError(
                    f"expected token ids below the model's vocabulary size {vocab_size:,}, found {max(ids):,} at item "
                    f"{item.index}; give the tokenizer that the model was trained with"
                )


def _gather(value: Any, accelerator: Any) -> list[Any]:
    """Return the value of every process, by rank."""
    if accelerator is None or accelerator.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
