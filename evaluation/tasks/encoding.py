"""How contexts and continuations become tokens: a part of every protocol."""

from collections.abc import Sequence

from evaluation.tasks.task_types import Encoder, Ids, Request


def context_tokens(encoder: Encoder, ids: Sequence[int]) -> Ids:
    """Return `ids` after the tokenizer's beginning-of-sequence tokens; the end-of-text token if `ids` is empty."""
    return (*encoder.bos_ids, *ids) if ids else (encoder.end_of_text_id,)


def encode_jointly(encoder: Encoder, context: str, continuation: str) -> Request:
    """Return the request of a continuation that is tokenized together with its context, as lm-evaluation-harness does.

    White space at the end of the context moves to the continuation. As many tokens as the context has on its own are
    context.
    """
    ids = encoder.encode(context + continuation)
    context = context.rstrip()
    count = len(encoder.encode(context)) if context else 0
    return Request(context_tokens(encoder, ids[:count]), tuple(ids[count:]))


def encode_candidates(encoder: Encoder, context: str, texts: Sequence[str]) -> list[Request]:
    """Return a request for each of `texts`, all with the same context: the tokens of `context` that all of them share.

    A candidate may merge with the text before it: GPT-2 encodes "'said" as "'s" and "aid". That token is then scored
    for every candidate; lm-evaluation-harness would count it as context.
    """
    context_ids = tuple(encoder.encode(context.rstrip()))
    ids = [tuple(encoder.encode(text)) for text in texts]
    shared = common_prefix_length([context_ids, *ids])
    return [Request(context_tokens(encoder, context_ids[:shared]), each[shared:]) for each in ids]


def common_prefix_length(sequences: Sequence[Ids]) -> int:
    """Return how many tokens all sequences have in common at their beginning."""
    first, last = min(sequences), max(sequences)  # in lexicographic order, these two differ earliest
    for position, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return position
    return min(len(first), len(last))


def truncate_together(requests: Sequence[Request], n_positions: int) -> tuple[Request, ...]:
    """Return requests with the same number of tokens removed from the left of each, so that the longest one fits.

    All candidates keep the same context, of at least one token.
    """
    longest = max(len(request.context) + len(request.continuation) for request in requests)
    surplus = max(0, longest - (n_positions + 1))
    return tuple(
        Request(request.context[min(surplus, len(request.context) - 1) :], request.continuation, request.excluded)
        for request in requests
    )
