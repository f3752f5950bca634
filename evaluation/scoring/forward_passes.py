"""The forward passes of scoring: which positions are read, which are scored, and what is read once for several.

Sequences are padded on the right, where a causal model cannot see it, so that no mask is needed but for the gaps
between a padded prefix and what follows it.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from evaluation.scoring.shortcuts import fused_activations, only_at

TOKENS_PER_SCORED_TOKEN = 8
"""Tokens in a pass whose keys, values and activations take about as much memory as the logits of one."""

_ROWS_PER_SOFTMAX = {"cpu": 32}
_ROWS_PER_SOFTMAX_ELSEWHERE = 512
"""Positions whose probabilities are formed at once: on a CPU no more than its caches hold."""

_MOST_SCORED_OF_ONE_TEXT = 2048
"""Positions of a single sequence whose logits are formed at once; a longer one is read in pieces, through the cache."""

_TOKENS_PER_PASS = {"cpu": 64}
_TOKENS_PER_PASS_ELSEWHERE = 2048
"""Tokens that cost about as much as another pass does: reading the weights, or starting the kernels."""


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
        # The key-value cache is `cache` since transformers 5.24, and `past_key_values` in older code.
        arguments = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"
        self._last_position = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) - 1

    @property
    def tokens_per_pass(self) -> int:
        """Return how many tokens cost as much as another pass."""
        return _TOKENS_PER_PASS.get(self._device.type, _TOKENS_PER_PASS_ELSEWHERE)

    @property
    def can_share_prefixes(self) -> bool:
        """Return whether the model keeps keys and values by position, every one of them, and sees all of them."""
        arguments = inspect.signature(self._model.forward).parameters
        config = self._model.config.get_text_config()
        if not {self._cache_name, "position_ids", "use_cache"} <= set(arguments):
            return False
        if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's windows count the gaps of a padded prefix
            return False
        layers = DynamicCache(config=config).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    @torch.inference_mode()
    def alone(self, passages: Sequence[Passage], budget: int) -> list[Score]:
        """Return the scores of passages, each of which is read by itself, in passes of at most `budget` tokens."""
        scores = [Score() for _ in passages]
        lengths = {owner: len(passage.ids) - 1 for owner, passage in enumerate(passages)}
        most = max(_MOST_SCORED_OF_ONE_TEXT, budget // TOKENS_PER_SCORED_TOKEN)
        for owners in self._batches(passages, lengths, budget):
            [first, *others] = owners
            scored = len(passages[first].ids) - passages[first].first_scored
            if scored > most and not others and self.can_share_prefixes:
                self._score_in_pieces(scores, passages, first, most)
                continue
            targets = [
                _Target(owner, row, column - 1, passages[owner].ids[column])
                for row, owner in enumerate(owners)
                for column in range(passages[owner].first_scored, len(passages[owner].ids))
            ]
            inputs = self._padded([passages[owner].ids[:-1] for owner in owners])
            self._add_up(scores, passages, targets, input_ids=inputs, use_cache=False)
        return scores

    def _score_in_pieces(self, scores: list[Score], passages: Sequence[Passage], owner: int, length: int) -> None:
        """Read a passage `length` tokens at a time, each piece behind the keys and values of those before it."""
        ids = passages[owner].ids
        cache = DynamicCache(config=self._model.config)
        for start in range(0, len(ids) - 1, length):
            end = min(start + length, len(ids) - 1)
            targets = [
                _Target(owner, 0, column - 1 - start, ids[column])
                for column in range(max(start + 1, passages[owner].first_scored), end + 1)
            ]
            inputs = torch.tensor([ids[start:end]], device=self._device)
            seen = torch.ones(1, end, dtype=torch.long, device=self._device)
            self._add_up(
                scores,
                passages,
                targets,
                input_ids=inputs,
                attention_mask=seen,
                use_cache=True,
                **{self._cache_name: cache},
            )

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

        beginnings = [Passage(group[0].ids[: n + 1], n) for group, n in zip(groups, prefixes, strict=True)]
        owners_of: list[list[int]] = [[] for _ in groups]
        for owner, number in enumerate(group_of):
            owners_of[number].append(owner)
        cache = _PrefixCache(len(groups), max(prefixes))
        for numbers in self._batches(beginnings, dict(enumerate(prefixes)), budget):
            targets = [
                # The prefix's last token scores the first one behind it, of which every passage has its own.
                _Target(owner, row, column - 1, passages[owner].ids[column])
                for row, number in enumerate(numbers)
                for owner in owners_of[number]
                for column in range(passages[owner].first_scored, prefixes[number] + 1)
            ]
            inputs = self._padded([beginnings[number].ids[:-1] for number in numbers])
            cache.keep(self._add_up(scores, passages, targets, input_ids=inputs, use_cache=True), numbers)

        lengths = {owner: len(passage.ids) - 1 - prefixes[group_of[owner]] for owner, passage in enumerate(passages)}
        # An ending of a single token has been scored by the prefix.
        lengths = {owner: length for owner, length in lengths.items() if length}
        for owners in self._batches(passages, lengths, budget, cached=max(prefixes)):
            self._score_endings(scores, passages, owners, group_of, prefixes, cache)
        return scores

    def _score_endings(
        self,
        scores: list[Score],
        passages: Sequence[Passage],
        owners: Sequence[int],
        group_of: Sequence[int],
        prefixes: Sequence[int],
        cache: "_PrefixCache",
    ) -> None:
        """Read what follows the prefixes of `owners`, behind a copy of their keys and values."""
        starts = [prefixes[group_of[owner]] for owner in owners]
        endings = self._padded([passages[owner].ids[start:-1] for owner, start in zip(owners, starts, strict=True)])
        targets = [
            _Target(owner, row, column - 1 - start, passages[owner].ids[column])
            for row, (owner, start) in enumerate(zip(owners, starts, strict=True))
            for column in range(max(start + 1, passages[owner].first_scored), len(passages[owner].ids))
        ]
        begin = torch.tensor(starts, device=self._device)[:, None]
        longest, length = max(starts), endings.shape[1]
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
            use_cache=True,
            **{self._cache_name: cache.of([group_of[owner] for owner in owners], longest)},
        )

    @torch.inference_mode()
    def generate(self, asked: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[int, ...] | None]:
        """Return greedy continuations, each of at most `new_tokens` tokens; None for NaN.

        Contexts are cut from the left so that they fit the model together with what is generated. What the model's own
        generation config asks for (a penalty, tokens to suppress) is left out but for where a text ends.
        """
        longest = self._last_position + 1 - new_tokens if self._last_position > 0 else None
        contexts = [list(context)[-longest:] if longest else list(context) for context in asked]
        width = max(len(context) for context in contexts)
        padding = self._padding_id()
        inputs = torch.tensor([[padding] * (width - len(context)) + context for context in contexts])
        mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context in contexts])
        nan = torch.zeros(len(asked), dtype=torch.bool, device=self._device)

        def look(input_ids: Tensor, scores: Tensor) -> Tensor:
            nan.logical_or_(scores.isnan().any(-1))
            return scores

        own = self._model.generation_config
        self._model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=padding)
        try:
            output = self._model.generate(
                inputs.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=new_tokens,
                logits_processor=LogitsProcessorList([look]),
            )
        finally:
            self._model.generation_config = own
        ends = set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
        continuations: list[tuple[int, ...] | None] = []
        for new, spoilt in zip(output[:, width:].tolist(), nan.tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in ends), new_tokens)
            continuations.append(None if spoilt else tuple(new[:end]))
        return continuations

    def _batches(
        self, passages: Sequence[Passage], lengths: Mapping[int, int], budget: int, cached: int = 0
    ) -> list[list[int]]:
        """Return the keys of `lengths`, longest first, in the passes that cost least together, as far as memory allows.

        Args:
            passages: of which the keys are places.
            lengths: how many tokens of each passage are read.
            budget: tokens in a pass, padding included.
            cached: tokens that each sequence has before it.
        """
        keys = sorted(lengths, key=lengths.__getitem__, reverse=True)
        scored = [min(lengths[key], len(passages[key].ids) - passages[key].first_scored) for key in keys]
        costs, starts = [0], [0]  # of reading the first so many, in tokens, and where the last of their passes starts
        for end in range(1, len(keys) + 1):
            cheapest, chosen, logits = math.inf, end - 1, 0
            for start in range(end - 1, -1, -1):
                rows, longest = end - start, lengths[keys[start]]
                logits += scored[start]
                full = rows * (cached + longest) > budget or logits > budget // TOKENS_PER_SCORED_TOKEN
                if full and rows > 1:
                    break
                cost = costs[start] + self.tokens_per_pass + rows * longest
                if cost < cheapest:
                    cheapest, chosen = cost, start
            costs.append(int(cheapest))
            starts.append(chosen)
        batches, end = [], len(keys)
        while end:
            batches.append(keys[starts[end] : end])
            end = starts[end]
        return batches[::-1]

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
        with fused_activations(self._model), only_at(self._model, rows, columns):
            output = self._model(**inputs)
        logits = output.logits
        if logits.shape[:2] == inputs["input_ids"].shape and logits.shape[:2] != (1, len(places)):
            logits = logits[rows, columns]
        logits = logits.reshape(len(places), -1)

        targets = sorted(targets, key=lambda t: places[t.row, t.column])
        number = torch.tensor([places[t.row, t.column] for t in targets], dtype=torch.long, device=self._device)
        tokens = torch.tensor([t.token for t in targets], dtype=torch.long, device=self._device)
        log_probabilities = self._log_probabilities(logits, number, tokens)
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
        if not inputs["use_cache"]:
            return None
        return output.cache if "cache" in output else output.past_key_values

    def _log_probabilities(self, logits: Tensor, number: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-probability of each token at a place, (targets,); logits (places, vocab_size), places rise."""
        rows = _ROWS_PER_SOFTMAX.get(self._device.type, _ROWS_PER_SOFTMAX_ELSEWHERE)
        ends = torch.bincount(number // rows, minlength=math.ceil(len(logits) / rows)).cpu().tolist()
        found = [
            part.float().log_softmax(-1)[places % rows, ids]
            for part, places, ids in zip(logits.split(rows), number.split(ends), tokens.split(ends), strict=True)
        ]
        return torch.cat(found)


class _PrefixCache:
    """Keys and values of prefixes, each as (prefixes, n_head, longest prefix, head_dim).

    Args:
        prefixes: how many.
        longest: tokens of the longest one.
    """

    def __init__(self, prefixes: int, longest: int) -> None:
        self._shape = (prefixes, longest)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def keep(self, cache: Any, numbers: Sequence[int]) -> None:
        """Copy a cache, whose rows are the prefixes of these numbers."""
        prefixes, longest = self._shape
        for place, layer in enumerate(cache.layers):
            if place == len(self._layers):
                new = [
                    part.new_zeros(prefixes, part.shape[1], longest, part.shape[3])
                    for part in (layer.keys, layer.values)
                ]
                self._layers.append((new[0], new[1]))
            for kept, part in zip(self._layers[place], (layer.keys, layer.values), strict=True):
                kept[numbers, :, : part.shape[2]] = part

    def of(self, numbers: Sequence[int], longest: int) -> DynamicCache:
        """Return a cache of its own with the first `longest` tokens of these prefixes, one per row."""
        cache = DynamicCache()
        for place, (keys, values) in enumerate(self._layers):
            cache.update(keys[:, :, :longest][numbers], values[:, :, :longest][numbers], place)
        return cache
