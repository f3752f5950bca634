"""The forward passes of scoring: shared prefixes are read once, and only scored positions get logits.

Sequences are padded on the right, where a causal model cannot see, so a mask is needed only for the gap between a
padded prefix and its continuation.
"""

import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicLayer

from evaluation.tasks.task_types import LogLikelihood, Request

# Tokens whose keys, values and activations take about as much memory as the logits of one token.
TOKENS_PER_SCORED_TOKEN = 8
# Tokens that take about as long as the constant part of a pass, reading the weights or launching kernels; and positions
# whose probabilities are computed together, on a CPU no more than fit into its caches.
_ON_CPU, _ON_GPU = (64, 32), (2048, 512)
# Positions of one sequence whose logits are computed together; a longer sequence is read in pieces.
_MAX_SCORED_AT_ONCE = 2048
_POSITIONS_IF_UNLIMITED = 2048


def n_positions_of(model: Any) -> int:
    """Return the longest sequence that `model` takes, in tokens; 2,048 if it has no limit."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or _POSITIONS_IF_UNLIMITED)


@dataclass(frozen=True)
class _Row:
    """Tokens [start, end) to read, which the requests `owners` share; the tokens after each of them may be scored."""

    owners: Sequence[int]
    start: int
    end: int


class ForwardPasses:
    """Scores requests that fit into a causal language model of transformers, which is in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._arguments = set(inspect.signature(model.forward).parameters)
        # The key-value cache is called `cache` since transformers 5.24.
        self._cache_name = "cache" if "cache" in self._arguments else "past_key_values"
        self._tokens_per_pass, self._rows_per_softmax = _ON_CPU if self._device.type == "cpu" else _ON_GPU

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
    def separate(self, requests: Sequence[Request], budget: int) -> list[LogLikelihood]:
        """Return the scores of requests that are read independently, in passes of at most `budget` tokens."""
        scores = [LogLikelihood(0.0, 0, True)] * len(requests)
        lengths = {owner: len(request.ids) - 1 for owner, request in enumerate(requests)}
        scored = {owner: len(request.continuation) for owner, request in enumerate(requests)}
        at_once = max(_MAX_SCORED_AT_ONCE, budget // TOKENS_PER_SCORED_TOKEN)
        for owners in cheapest_batches(lengths, scored, budget=budget, tokens_per_pass=self._tokens_per_pass):
            if len(owners) > 1 or scored[owners[0]] <= at_once or not self.can_share_prefixes:
                self._score(requests, scores, [_Row([owner], 0, lengths[owner]) for owner in owners], use_cache=False)
                continue
            inputs: dict[str, Any] = {"use_cache": True, self._cache_name: DynamicCache(config=self._model.config)}
            last = lengths[owners[0]]
            for start in range(0, last, at_once):
                row = _Row(owners, start, min(start + at_once, last))
                inputs["attention_mask"] = torch.ones(1, row.end, dtype=torch.long, device=self._device)
                self._score(requests, scores, [row], **inputs)
        return scores

    @torch.inference_mode()
    def shared(self, groups: Sequence[Sequence[Request]], prefixes: Sequence[int], budget: int) -> list[LogLikelihood]:
        """Return the scores of groups of requests, where the tokens that a group has in common are read once.

        The requests of group n begin with the same `prefixes[n]` tokens. Cached tokens count in `budget` too.
        """
        requests = [request for group in groups for request in group]
        group_of = [number for number, group in enumerate(groups) for _ in group]
        owners_in_order = iter(range(len(requests)))
        members = [[next(owners_in_order) for _ in group] for group in groups]
        scores = [LogLikelihood(0.0, 0, True)] * len(requests)

        cache = _PrefixCache(len(groups), max(prefixes))
        lengths = dict(enumerate(prefixes))
        in_pass = {"budget": budget, "tokens_per_pass": self._tokens_per_pass}
        for numbers in cheapest_batches(lengths, dict.fromkeys(lengths, 1), **in_pass):
            rows = [_Row(members[number], 0, prefixes[number]) for number in numbers]
            cache.store(self._score(requests, scores, rows, use_cache=True), numbers)

        lengths = {owner: len(request.ids) - 1 - prefixes[group_of[owner]] for owner, request in enumerate(requests)}
        # A single token after the prefix was scored with the prefix.
        lengths = {owner: length for owner, length in lengths.items() if length}
        scored = {owner: min(length, len(requests[owner].continuation)) for owner, length in lengths.items()}
        for owners in cheapest_batches(lengths, scored, cached=max(prefixes), **in_pass):
            numbers = [group_of[owner] for owner in owners]
            starts = [prefixes[number] for number in numbers]
            rows = [_Row([owner], n, n + lengths[owner]) for owner, n in zip(owners, starts, strict=True)]
            inputs = self._after_prefixes(starts, max(row.end - row.start for row in rows))
            inputs[self._cache_name] = cache.of(numbers, max(starts))
            self._score(requests, scores, rows, use_cache=True, **inputs)
        return scores

    def _after_prefixes(self, prefixes: Sequence[int], length: int) -> dict[str, Any]:
        """Return attention mask and position ids of rows of `length` tokens that follow cached, padded prefixes."""
        start = torch.tensor(prefixes, device=self._device)[:, None]
        longest = max(prefixes)
        slots = torch.arange(longest + length, device=self._device)
        positions = start + torch.arange(length, device=self._device)
        positions = positions.clamp(max=n_positions_of(self._model) - 1)  # those of padding may exceed it
        return {"attention_mask": ((slots < start) | (slots >= longest)).long(), "position_ids": positions}

    def _score(
        self, requests: Sequence[Request], scores: list[LogLikelihood], rows: Sequence[_Row], **inputs: Any
    ) -> Any:
        """Run the model on `rows`, add the tokens that they predict to their owners' scores, and return the cache."""
        targets = sorted(  # row, column of the token before, owner, token
            (number, index - 1 - row.start, owner, requests[owner].ids[index])
            for number, row in enumerate(rows)
            for owner in row.owners
            for index in range(max(row.start + 1, len(requests[owner].context)), row.end + 1)
        )
        position_of: dict[tuple[int, int], int] = {}
        for number, column, _, _ in targets or [(0, 0, 0, 0)]:  # a prefix may have nothing to score
            position_of.setdefault((number, column), len(position_of))
        row_index, column_index = torch.tensor(list(position_of), device=self._device).unbind(1)
        sequences = [requests[row.owners[0]].ids[row.start : row.end] for row in rows]
        longest = max(map(len, sequences))
        # Padded with the sequence's own last token, which is never a pad token.
        padded = [[*sequence, *[sequence[-1]] * (longest - len(sequence))] for sequence in sequences]
        input_ids = torch.tensor(padded, device=self._device)
        # Logits of these positions only, (1, positions, vocab_size), if the model declares its head.
        head = self._model.get_output_embeddings() or nn.Identity()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][row_index, column_index][None], *args[1:]))
        with hook, _fused_gelu(self._model):
            output = self._model(input_ids=input_ids, **inputs)
        logits = output.logits
        if logits.shape[:2] != (1, len(position_of)):
            logits = logits[row_index, column_index]
        logits = logits.reshape(len(position_of), -1)

        positions = [position_of[number, column] for number, column, _, _ in targets]
        owners = [owner for _, _, owner, _ in targets]
        position = torch.tensor(positions, dtype=torch.long, device=self._device)
        token = torch.tensor([token for *_, token in targets], dtype=torch.long, device=self._device)
        greedy = logits.argmax(-1)[position] == token
        for excluded in {requests[owner].excluded for owner in owners} - {frozenset()}:
            concerned = [index for index, owner in enumerate(owners) if requests[owner].excluded == excluded]
            allowed = logits[position[concerned]]
            allowed[:, sorted(excluded)] = -torch.inf
            greedy[concerned] = allowed.argmax(-1) == token[concerned]
        log_probabilities = self._log_probabilities(logits, position, token)
        for owner, value, chosen in zip(owners, log_probabilities.tolist(), greedy.tolist(), strict=True):
            score = scores[owner]
            scores[owner] = LogLikelihood(score.sum + value, score.tokens + 1, score.greedy and chosen)
        if not inputs["use_cache"]:
            return None
        return output.cache if "cache" in output else output.past_key_values

    def _log_probabilities(self, logits: Tensor, position: Tensor, token: Tensor) -> Tensor:
        """Return log p of each (position, token), (targets,); logits are (positions, vocab_size), positions ascend."""
        rows = self._rows_per_softmax
        parts = logits.split(rows)
        counts = torch.bincount(position // rows, minlength=len(parts)).cpu().tolist()
        return torch.cat(
            [
                part.float().log_softmax(-1)[positions % rows, tokens]
                for part, positions, tokens in zip(parts, position.split(counts), token.split(counts), strict=True)
            ]
        )


@contextmanager
def _fused_gelu(model: nn.Module) -> Iterator[None]:
    """Compute GPT-2's `gelu_new` with one kernel instead of eight, which saves some 7 % of LAMBADA's time on a CPU."""
    activations = [
        module for module in model.modules() if type(module) is NewGELUActivation and "forward" not in vars(module)
    ]  # an instance attribute `forward` means that the activation was wrapped, for example by a hook of accelerate
    for module in activations:
        vars(module)["forward"] = functools.partial(nn.functional.gelu, approximate="tanh")
    try:
        yield
    finally:
        for module in activations:
            del vars(module)["forward"]


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


def cheapest_batches(
    lengths: Mapping[int, int], scored: Mapping[int, int], *, budget: int, tokens_per_pass: int, cached: int = 0
) -> list[list[int]]:
    """Return the keys of `lengths`, longest first, in the batches that take the least time and fit into memory.

    Dynamic programming over the sorted lengths: a pass over n sequences costs n times the longest one, padding
    included, and a constant, `tokens_per_pass`. Of each sequence, `lengths` are read, `scored` get logits, and `cached`
    tokens are in the cache already; `budget` is the number of tokens in a pass, padding and cached ones included.
    """
    keys = sorted(lengths, key=lengths.__getitem__, reverse=True)
    costs, starts = [0], [0]  # of the first n sequences: their cost, and where their last batch starts
    for end in range(1, len(keys) + 1):
        cheapest, cheapest_start, logits = math.inf, end - 1, 0
        for start in range(end - 1, -1, -1):
            rows, longest = end - start, lengths[keys[start]]
            logits += scored[keys[start]]
            too_much = rows * (cached + longest) > budget or logits * TOKENS_PER_SCORED_TOKEN > budget
            if too_much and rows > 1:
                break
            cost = costs[start] + tokens_per_pass + rows * longest
            if cost < cheapest:
                cheapest, cheapest_start = cost, start
        costs.append(int(cheapest))
        starts.append(cheapest_start)
    batches, end = [], len(keys)
    while end:
        batches.append(keys[starts[end] : end])
        end = starts[end]
    return batches[::-1]
