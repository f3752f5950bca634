"""The forward passes of scoring: shared prefixes are read once, and only scored positions get logits.

Sequences are padded on the right, where a causal model cannot see, so a mask is needed only for the gap between a
padded prefix and its continuation.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from evaluation.scoring.batching import TOKENS_PER_SCORED_TOKEN, cheapest_batches

_TOKENS_PER_PASS = {"cpu": 64}
_TOKENS_PER_PASS_ELSEWHERE = 2048
"""Tokens that take about as long as the constant part of a pass: reading the weights, or launching kernels."""

_ROWS_PER_SOFTMAX = {"cpu": 32}
_ROWS_PER_SOFTMAX_ELSEWHERE = 512
"""Positions whose probabilities are computed at once: on a CPU no more than its caches hold."""

_MAX_SCORED_AT_ONCE = 2048
"""Positions of one sequence whose logits are computed at once; a longer sequence is read in pieces."""


@dataclass(frozen=True)
class Passage:
    """A sequence of tokens whose end is scored.

    Attributes:
        ids: all tokens; the last one is scored, not read.
        first_scored: the index of the first scored token; all later ones are scored too.
        excluded: tokens that the greedy choice ignores.
    """

    ids: tuple[int, ...]
    first_scored: int
    excluded: frozenset[int] = frozenset()


@dataclass
class Score:
    """The log-likelihood of a passage, accumulated over passes."""

    sum: float = 0.0
    tokens: int = 0
    greedy: bool = True


@dataclass(frozen=True)
class _Row:
    """Tokens [start, end) of the passages `owners`, which share them; each owner's next tokens are scored."""

    owners: Sequence[int]
    start: int
    end: int


class ForwardPasses:
    """Scores passages with a causal language model of transformers, which is in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._arguments = set(inspect.signature(model.forward).parameters)
        # The key-value cache is called `cache` since transformers 5.24.
        self._cache_name = "cache" if "cache" in self._arguments else "past_key_values"
        self._tokens_per_pass = _TOKENS_PER_PASS.get(self._device.type, _TOKENS_PER_PASS_ELSEWHERE)

    @property
    def can_share_prefixes(self) -> bool:
        """Whether the model's cache keeps all keys and values by position, and attention sees all of them."""
        config = self._model.config.get_text_config()
        if not {self._cache_name, "position_ids", "use_cache"} <= self._arguments:
            return False
        if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's windows count the gap of a padded prefix
            return False
        return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)

    @torch.inference_mode()
    def separate(self, passages: Sequence[Passage], budget: int) -> list[Score]:
        """Return the scores of passages that are read independently, in passes of at most `budget` tokens."""
        scores = [Score() for _ in passages]
        lengths = {owner: len(passage.ids) - 1 for owner, passage in enumerate(passages)}
        at_once = max(_MAX_SCORED_AT_ONCE, budget // TOKENS_PER_SCORED_TOKEN)
        for owners in self._batches(passages, lengths, budget):
            passage = passages[owners[0]]
            too_long = len(passage.ids) - passage.first_scored > at_once
            if len(owners) == 1 and too_long and self.can_share_prefixes:
                self._score_in_pieces(passages, scores, owners[0], at_once)
            else:
                self._score(passages, scores, [_Row([owner], 0, lengths[owner]) for owner in owners], use_cache=False)
        return scores

    def _score_in_pieces(self, passages: Sequence[Passage], scores: list[Score], owner: int, length: int) -> None:
        """Score a passage `length` tokens at a time, with the keys and values of the pieces before."""
        cache = DynamicCache(config=self._model.config)
        last = len(passages[owner].ids) - 1
        for start in range(0, last, length):
            end = min(start + length, last)
            mask = torch.ones(1, end, dtype=torch.long, device=self._device)
            inputs = {"attention_mask": mask, "use_cache": True, self._cache_name: cache}
            self._score(passages, scores, [_Row([owner], start, end)], **inputs)

    @torch.inference_mode()
    def shared(self, groups: Sequence[Sequence[Passage]], prefixes: Sequence[int], budget: int) -> list[Score]:
        """Return the scores of groups of passages, where the tokens that a group has in common are read once.

        Args:
            groups: passages that begin with the same tokens.
            prefixes: how many tokens each group has in common; at most the first of them is not followed by scores.
            budget: tokens in a pass, cached ones included.
        """
        passages = [passage for group in groups for passage in group]
        group_of = [number for number, group in enumerate(groups) for _ in group]
        members: list[list[int]] = [[] for _ in groups]
        for owner, number in enumerate(group_of):
            members[number].append(owner)
        scores = [Score() for _ in passages]

        cache = _PrefixCache(len(groups), max(prefixes))
        beginnings = [Passage(group[0].ids[: n + 1], n) for group, n in zip(groups, prefixes, strict=True)]
        for numbers in self._batches(beginnings, dict(enumerate(prefixes)), budget):
            rows = [_Row(members[number], 0, prefixes[number]) for number in numbers]
            cache.store(self._score(passages, scores, rows, use_cache=True), numbers)

        lengths = {owner: len(passage.ids) - 1 - prefixes[group_of[owner]] for owner, passage in enumerate(passages)}
        # A single token after the prefix was scored with the prefix.
        lengths = {owner: length for owner, length in lengths.items() if length}
        for owners in self._batches(passages, lengths, budget, cached=max(prefixes)):
            numbers = [group_of[owner] for owner in owners]
            starts = [prefixes[number] for number in numbers]
            rows = [_Row([owner], n, n + lengths[owner]) for owner, n in zip(owners, starts, strict=True)]
            inputs = self._behind_prefixes(starts, max(row.end - row.start for row in rows))
            inputs[self._cache_name] = cache.of(numbers, max(starts))
            self._score(passages, scores, rows, use_cache=True, **inputs)
        return scores

    def _behind_prefixes(self, prefixes: Sequence[int], length: int) -> dict[str, Any]:
        """Return attention mask and position ids of rows of `length` tokens that follow cached, padded prefixes."""
        start = torch.tensor(prefixes, device=self._device)[:, None]
        longest = max(prefixes)
        slots = torch.arange(longest + length, device=self._device)
        positions = start + torch.arange(length, device=self._device)
        n_positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if n_positions:
            positions = positions.clamp(max=n_positions - 1)  # those of padding may exceed it
        return {"attention_mask": ((slots < start) | (slots >= longest)).long(), "position_ids": positions}

    def _batches(
        self, passages: Sequence[Passage], lengths: Mapping[int, int], budget: int, cached: int = 0
    ) -> list[list[int]]:
        """Return the keys of `lengths`, which are indices of passages, as `cheapest_batches`."""
        scored = {
            key: min(length, len(passages[key].ids) - passages[key].first_scored) for key, length in lengths.items()
        }
        return cheapest_batches(lengths, scored, budget=budget, cached=cached, tokens_per_pass=self._tokens_per_pass)

    def _score(self, passages: Sequence[Passage], scores: list[Score], rows: Sequence[_Row], **inputs: Any) -> Any:
        """Run the model on `rows`, add the tokens that they predict to their owners' scores, and return the cache."""
        targets = sorted(  # row, column of the token before, owner, token
            (number, index - 1 - row.start, owner, passages[owner].ids[index])
            for number, row in enumerate(rows)
            for owner in row.owners
            for index in range(max(row.start + 1, passages[owner].first_scored), row.end + 1)
        )
        position_of: dict[tuple[int, int], int] = {}
        for number, column, _, _ in targets or [(0, 0, 0, 0)]:  # a prefix may have nothing to score
            position_of.setdefault((number, column), len(position_of))
        row_index, column_index = torch.tensor(list(position_of), device=self._device).unbind(1)
        input_ids = self._padded([passages[row.owners[0]].ids[row.start : row.end] for row in rows])
        with _head_only_at(self._model, row_index, column_index):
            output = self._model(input_ids=input_ids, **inputs)
        logits = output.logits
        if logits.shape[:2] != (1, len(position_of)):  # the model has a head that it does not declare
            logits = logits[row_index, column_index]
        logits = logits.reshape(len(position_of), -1)

        positions = [position_of[number, column] for number, column, _, _ in targets]
        owners = [owner for _, _, owner, _ in targets]
        position = torch.tensor(positions, dtype=torch.long, device=self._device)
        token = torch.tensor([token for *_, token in targets], dtype=torch.long, device=self._device)
        greedy = logits.argmax(-1)[position] == token
        for excluded in {passages[owner].excluded for owner in owners} - {frozenset()}:
            concerned = [index for index, owner in enumerate(owners) if passages[owner].excluded == excluded]
            allowed = logits[position[concerned]]
            allowed[:, sorted(excluded)] = -torch.inf
            greedy[concerned] = allowed.argmax(-1) == token[concerned]
        log_probabilities = self._log_probabilities(logits, position, token)
        for owner, value, chosen in zip(owners, log_probabilities.tolist(), greedy.tolist(), strict=True):
            score = scores[owner]
            score.sum += value
            score.tokens += 1
            score.greedy &= chosen
        if not inputs["use_cache"]:
            return None
        return output.cache if "cache" in output else output.past_key_values

    def _log_probabilities(self, logits: Tensor, position: Tensor, token: Tensor) -> Tensor:
        """Return log p of each (position, token), (targets,); logits are (positions, vocab_size), positions ascend."""
        rows = _ROWS_PER_SOFTMAX.get(self._device.type, _ROWS_PER_SOFTMAX_ELSEWHERE)
        parts = logits.split(rows)
        counts = torch.bincount(position // rows, minlength=len(parts)).cpu().tolist()
        return torch.cat(
            [
                part.float().log_softmax(-1)[positions % rows, tokens]
                for part, positions, tokens in zip(parts, position.split(counts), token.split(counts), strict=True)
            ]
        )

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return (batch, seq), padded on the right with the sequence's own last token, which is never a pad token."""
        longest = max(map(len, sequences))
        rows = [[*sequence, *[sequence[-1]] * (longest - len(sequence))] for sequence in sequences]
        return torch.tensor(rows, device=self._device)


@contextmanager
def _head_only_at(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Make the model compute logits at these positions only, (1, positions, vocab_size), by a hook on its head."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns][None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


class _PrefixCache:
    """Keys and values of prefixes, one pair of tensors (prefixes, n_head, longest prefix, head_dim) per layer."""

    def __init__(self, prefixes: int, longest: int) -> None:
        self._prefixes, self._longest = prefixes, longest
        self._layers: list[tuple[Tensor, Tensor]] = []

    def store(self, cache: Any, prefixes: Sequence[int]) -> None:
        """Copy a cache whose rows are these prefixes."""
        for index, layer in enumerate(cache.layers):
            parts = (layer.keys, layer.values)
            if index == len(self._layers):
                keys, values = (
                    part.new_zeros(self._prefixes, part.shape[1], self._longest, part.shape[3]) for part in parts
                )
                self._layers.append((keys, values))
            for stored, part in zip(self._layers[index], parts, strict=True):
                stored[prefixes, :, : part.shape[2]] = part

    def of(self, prefixes: Sequence[int], longest: int) -> DynamicCache:
        """Return a new cache with the first `longest` tokens of these prefixes, one per row."""
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys[:, :, :longest][prefixes], values[:, :, :longest][prefixes], index)
        return cache
