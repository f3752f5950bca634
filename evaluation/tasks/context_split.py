"""Where a context ends and its continuation begins, in tokens."""

from collections.abc import Sequence

from evaluation.tasks.task_types import Encoder, Ids, Request


def split_as_whole(encoder: Encoder, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Return the tokens of context and continuation, tokenised as one text (lm-evaluation-harness).

    White space at the end of the context goes to the continuation, where it belongs to the first word. As many tokens
    as the context has by itself are context, behind what the tokenizer puts before every text; an empty context is the
    end-of-text token.
    """
    bare = context.rstrip()
    whole = encoder.encode(context + continuation)
    if not bare:
        return (encoder.end_of_text_id,), tuple(encoder.encode(context + continuation))
    count = len(encoder.encode(bare))
    return (*encoder.beginning, *whole[:count]), tuple(whole[count:])


def context_of(encoder: Encoder, ids: Sequence[int]) -> Ids:
    """Return `ids` behind what the tokenizer puts before every text; the end-of-text token when there are none."""
    return (*encoder.beginning, *ids) if ids else (encoder.end_of_text_id,)


def behind_the_same_context(encoder: Encoder, context: str, texts: Sequence[str]) -> list[Request]:
    """Return a request for each text, all behind the tokens of `context` that every text begins with.

    A candidate may merge with what stands before it: GPT-2 reads "'said" as "'s" and "aid". Such a token is then scored
    for every candidate, where lm-evaluation-harness would count it as context and so not at all.
    """
    alone = tuple(encoder.encode(context.rstrip()))
    wholes = [tuple(encoder.encode(text)) for text in texts]
    shared = shared_length([alone, *wholes])
    before = context_of(encoder, alone[:shared])
    return [Request(before, whole[shared:]) for whole in wholes]


def shared_length(sequences: Sequence[Ids]) -> int:
    """Return how many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # those that differ earliest, in lexicographic order
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


def cut_together(requests: Sequence[Request], n_positions: int) -> tuple[Request, ...]:
    """Return requests with the same number of tokens cut from the left of each, so that the longest fits.

    Candidates are then judged behind the same context. At least one token of context stays.
    """
    longest = max(len(request.context) + len(request.continuation) for request in requests)
    surplus = max(0, longest - (n_positions + 1))
    return tuple(
        Request(request.context[min(surplus, len(request.context) - 1) :], request.continuation, request.excluded)
        for request in requests
    )
