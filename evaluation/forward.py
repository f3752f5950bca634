"""The forward passes of scoring: which positions are read, which are scored, and what is read once for several.

Sequences are padded on the right, where a causal model cannot see it, so that no mask is needed but for the gaps
between a padded prefix and what follows it.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROWS_PER_SOFTMAX = 512


@dataclass(frozen=True)
class Passage:
    """A sequence of tokens, some of which are scored.

    Attributes:
        ids: all tokens; the last one is scored, not read.
        first_scored: the place of the first token that is scored; those behind it are too.
        excluded: tokens that the greedy choice passes over.
    """

    ids: tuple[int, ...]
    first_scored: int
    excluded: frozenset[int] = frozenset()


@dataclass
class Score:
    """A passage's log-likelihood, as far as it has been added up."""

    sum: float = 0.0
    tokens: int = 0
    greedy: bool = True


@dataclass(frozen=True)
class _Target:
    """A token to be scored: whose it is, where its logits come from, and what it is."""

    owner: int
    row: int
    column: int
    token: int


class ForwardPasses:
    """Reads passages with a causal language model; scores come in the order of the passages.

    Args:
        model: of transformers, in evaluation mode when it is asked.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._last_position = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) - 1

    @property
    def can_share_prefixes(self) -> bool:
        """Return whether the model keeps keys and values by position, every one of them."""
        arguments = inspect.signature(self._model.forward).parameters
        config = self._model.config.get_text_config()
        if not {"past_key_values", "position_ids", "use_cache"} <= set(arguments):
            return False
        layers = DynamicCache(config=config).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    @torch.inference_mode()
    def alone(self, passages: Sequence[Passage], budget: int) -> list[Score]:
        """Return the scores of passages, each of which is read by itself, in passes of at most `budget` tokens."""
        scores = [Score() for _ in passages]
        longest = max(len(passage.ids) for passage in passages) - 1
        rows = max(1, budget // longest)
        for start in range(0, len(passages), rows):
            part = passages[start : start + rows]
            targets = [
                _Target(start + row, row, column - 1, passage.ids[column])
                for row, passage in enumerate(part)
                for column in range(passage.first_scored, len(passage.ids))
            ]
            inputs = self._padded([passage.ids[:-1] for passage in part])
            self._add_up(scores, passages, targets, input_ids=inputs, use_cache=False)
        return scores

    @torch.inference_mode()
    def shared(self, groups: Sequence[Sequence[Passage]], prefixes: Sequence[int], budget: int) -> list[Score]:
        """Return the scores of groups of passages, reading what a group begins with once.

        Args:
            groups: passages that begin with the same tokens.
            prefixes: how many tokens each group shares; no passage is scored before the second of them.
            budget: tokens, cached ones included, in a pass over endings.
        """
        passages = [passage for group in groups for passage in group]
        group_of = [number for number, group in enumerate(groups) for _ in group]
        scores = [Score() for _ in passages]

        targets = []
        for owner, passage in enumerate(passages):
            row = group_of[owner]
            # The prefix's last token scores the first one behind it, of which every passage has its own.
            for column in range(passage.first_scored, prefixes[row] + 1):
                targets.append(_Target(owner, row, column - 1, passage.ids[column]))
        inputs = self._padded([group[0].ids[:prefix] for group, prefix in zip(groups, prefixes, strict=True)])
        cache = self._add_up(scores, passages, targets, input_ids=inputs, use_cache=True)

        # Some endings are a single token, which the prefix has scored.
        endings = [owner for owner, passage in enumerate(passages) if len(passage.ids) - 1 > prefixes[group_of[owner]]]
        endings.sort(key=lambda owner: len(passages[owner].ids) - prefixes[group_of[owner]])
        while endings:
            longest_prefix = inputs.shape[1]
            part = endings[:1]
            for owner in endings[1:]:
                ending = len(passages[owner].ids) - 1 - prefixes[group_of[owner]]
                if (len(part) + 1) * (longest_prefix + ending) > budget:
                    break
                part.append(owner)
            endings = endings[len(part) :]
            self._score_endings(scores, passages, part, group_of, prefixes, cache)
        return scores

    def _score_endings(
        self,
        scores: list[Score],
        passages: Sequence[Passage],
        owners: Sequence[int],
        group_of: Sequence[int],
        prefixes: Sequence[int],
        cache: Any,
    ) -> None:
        """Read what follows the prefixes of `owners`, behind a copy of their keys and values."""
        starts = [prefixes[group_of[owner]] for owner in owners]
        endings = self._padded([passages[owner].ids[start:-1] for owner, start in zip(owners, starts, strict=True)])
        targets = [
            _Target(owner, row, column - 1 - start, passages[owner].ids[column])
            for row, (owner, start) in enumerate(zip(owners, starts, strict=True))
            for column in range(max(start + 1, passages[owner].first_scored), len(passages[owner].ids))
        ]
        chosen = torch.tensor([group_of[owner] for owner in owners], device=self._device)
        begin = torch.tensor(starts, device=self._device)[:, None]
        longest, length = cache.get_seq_length(), endings.shape[1]
        steps = torch.arange(length, device=self._device)
        slots = torch.arange(longest + length, device=self._device)
        mask = (slots < begin) | (slots >= longest)
        positions = begin + steps
        if self._last_position > 0:
            positions = positions.clamp(max=self._last_position)  # those of padding may lie behind the last
        self._add_up(
            scores,
            passages,
            targets,
            input_ids=endings,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=_rows(cache, chosen),
            use_cache=True,
        )

    @torch.inference_mode()
    def generate(self, asked: Sequence[tuple[Sequence[int], int]]) -> list[tuple[int, ...]]:
        """Return greedy continuations, each of at most so many tokens as stand beside its context.

        Contexts are cut from the left so that they fit the model together with what is generated.
        """
        new_tokens = max(count for _, count in asked)
        longest = self._last_position + 1 - new_tokens if self._last_position > 0 else None
        contexts = [list(context)[-longest:] if longest else list(context) for context, _ in asked]
        width = max(len(context) for context in contexts)
        padding = self._padding_id()
        inputs = torch.tensor([[padding] * (width - len(context)) + context for context in contexts])
        mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
        output = self._model.generate(
            inputs.to(self._device),
            attention_mask=mask.to(self._device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            pad_token_id=padding,
        )
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        continuations = []
        for new, (_, count) in zip(output[:, width:].tolist(), asked, strict=True):
            end = next((place for place, token in enumerate(new) if token in ends), count)
            continuations.append(tuple(new[: min(end, count)]))
        return continuations

    def _padding_id(self) -> int:
        """Return a token to fill up with; the mask hides it."""
        config = self._model.config.get_text_config()
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(config, name, None)
            value = value[0] if isinstance(value, list) else value
            if value is not None and 0 <= value < config.vocab_size:
                return int(value)
        return 0

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return (batch, seq), filled up on the right with a token of the sequence itself, which is never a pad."""
        longest = max(len(sequence) for sequence in sequences)
        rows = [[*sequence, *[sequence[-1]] * (longest - len(sequence))] for sequence in sequences]
        return torch.tensor(rows, device=self._device)

    def _add_up(
        self, scores: list[Score], passages: Sequence[Passage], targets: Sequence[_Target], **inputs: Any
    ) -> Any:
        """Run the model once, add every target to its owner's score, and return the cache."""
        places = {place: number for number, place in enumerate(dict.fromkeys((t.row, t.column) for t in targets))}
        if not places:  # a prefix of which nothing is scored
            places = {(0, 0): 0}
        rows, columns = (torch.tensor(part, device=self._device) for part in zip(*places, strict=True))
        with self._head_sees(rows, columns):
            output = self._model(**inputs)
        logits = output.logits
        if logits.shape[:2] == inputs["input_ids"].shape and logits.shape[:2] != (1, len(places)):
            logits = logits[rows, columns]
        logits = logits.reshape(len(places), -1)

        number = torch.tensor([places[t.row, t.column] for t in targets], dtype=torch.long, device=self._device)
        tokens = torch.tensor([t.token for t in targets], dtype=torch.long, device=self._device)
        normaliser = torch.cat([part.float().logsumexp(-1) for part in logits.split(_ROWS_PER_SOFTMAX)])
        log_probabilities = logits[number, tokens].float() - normaliser[number]
        greedy = logits.argmax(-1)[number] == tokens
        for excluded in {passages[target.owner].excluded for target in targets} - {frozenset()}:
            concerned = [place for place, t in enumerate(targets) if passages[t.owner].excluded == excluded]
            left = logits[number[concerned]].index_fill(
                1, torch.tensor(sorted(excluded), device=self._device), -torch.inf
            )
            greedy[concerned] = left.argmax(-1) == tokens[concerned]
        for target, value, first in zip(targets, log_probabilities.tolist(), greedy.tolist(), strict=True):
            score = scores[target.owner]
            score.sum += value
            score.tokens += 1
            score.greedy &= first
        return output.past_key_values if inputs["use_cache"] else None

    @contextmanager
    def _head_sees(self, rows: Tensor, columns: Tensor) -> Iterator[None]:
        """Give the head only these positions, as (1, positions, n_embd).

        A hook, and not the head called by hand: what some models do to logits behind it stays theirs.
        """
        head = self._model.get_output_embeddings()
        if head is None:
            yield
            return
        handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns][None], *args[1:]))
        try:
            yield
        finally:
            handle.remove()


def _rows(cache: Any, chosen: Tensor) -> DynamicCache:
    """Return a new cache with the chosen rows of another, which stays as it is."""
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys[chosen], layer.values[chosen], number)
    return copy
