"""What the demo page answers: a completion, and views of what the model thinks at one of its tokens.

The state of a page is a `Text` of its own. The model is shared and never written to, so pages do not mix their texts.
This file imports only the other files of the demo, because a Space carries them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import demo_views as views
from .inspection import Predictions, attention, layers, logit_lens, predictions, prepare, prompt_ids, sample_tokens

_LENS_COLUMNS = 12


class Text(NamedTuple):
    """What a page shows: token ids, how many of them are the prompt, the selected one, and the predictions."""

    ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    selected: int = 0
    predicted: Predictions | None = None


class Demo:
    """The answers of the page to its user; none of them keeps anything."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = prepare(model), tokenizer
        self.n_positions: int = model.config.max_position_embeddings

    def complete(
        self, prompt: str, max_new_tokens: float, temperature: float, top_k: float, top_p: float, seed: float | None
    ) -> Iterator[Text]:
        """Yield the prompt, and then the text after each new token.

        Raises:
            ValueError: a setting is out of range, or the prompt cannot be used.
        """
        check_settings(max_new_tokens, temperature, top_k, top_p, seed)
        vocab_size = self.model.get_input_embeddings().num_embeddings
        input_ids = prompt_ids(self.tokenizer, prompt, self.n_positions, vocab_size)
        text = Text(tuple(input_ids[0].tolist()), input_ids.shape[1])
        yield text
        counts = {"max_new_tokens": int(max_new_tokens), "top_k": int(top_k), "seed": int(seed or 0)}
        for token in sample_tokens(self.model, input_ids, temperature=temperature, top_p=top_p, **counts):
            text = text._replace(ids=(*text.ids, token))
            yield text

    def predict(self, text: Text) -> Text:
        """Return the text with its predictions, and its first new token selected, or else its last token."""
        selected = min(text.prompt_tokens, len(text.ids) - 1)
        return text._replace(predicted=predictions(self.model, torch.tensor([text.ids])), selected=selected)

    def show_text(self, text: Text) -> str:
        """Return the text's tokens, and one line on it once it has predictions."""
        shown = views.text_view(self.texts(text.ids), text.prompt_tokens, text.predicted, text.selected)
        return shown if text.predicted is None else shown + views.summary_view(text.predicted)

    def show_alternatives(self, text: Text) -> str:
        """Return the probability of the selected token and its alternatives, and what may follow the text."""
        assert text.predicted is not None
        texts = self.texts(text.ids)

        def view(index: int) -> str:
            assert text.predicted is not None
            best = self.texts(text.predicted.top_ids[index - 1].tolist())
            return views.alternatives_view(text.ids, texts, best, text.predicted, index)

        own = view(text.selected) if text.selected else '<p class="g-note">Nothing comes before the first token.</p>'
        return f'<div class="g-columns"><div>{own}</div><div>{view(len(texts))}</div></div>'

    def show_selected(self, text: Text, layer: float, head: float) -> tuple[str, str, str]:
        """Return the alternatives, attention and logit lens of the selected token, from one forward pass."""
        computed = self._layers(text)
        attends = self.show_attention(text, layer, head, computed)
        return self.show_alternatives(text), attends, self.show_lens(text, computed)

    def show_attention(self, text: Text, layer: float, head: float, computed: Any = None) -> str:
        """Return where the selected token attends to, in a layer and head that count from 1."""
        weights = attention(computed or self._layers(text), int(layer) - 1)
        return views.attention_view(self.texts(text.ids), weights, int(head) - 1, text.selected)

    def show_lens(self, text: Text, computed: Any = None) -> str:
        """Return the logit lens of the position that predicts the selected token, and of those before it."""
        position = max(text.selected - 1, 0)
        start = max(position + 1 - _LENS_COLUMNS, 0)
        columns = slice(start, start + _LENS_COLUMNS)
        probabilities = logit_lens(self.model, computed or self._layers(text), columns)
        ids = text.ids[start : columns.stop + 1]
        following = ids[position - start + 1] if position + 1 < len(text.ids) else None
        one = views.layers_view(probabilities[:, position - start], following, self.texts)
        return one + views.lens_view(probabilities, ids, self.texts)

    def _layers(self, text: Text) -> Any:
        return layers(self.model, torch.tensor([text.ids]))

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return views.token_texts(self.tokenizer, ids)


def check_settings(
    max_new_tokens: float | None,
    temperature: float | None,
    top_k: float | None,
    top_p: float | None,
    seed: float | None,
) -> None:
    """Raise a ValueError if a sampling setting is empty or out of range."""
    settings = {
        "New tokens": (max_new_tokens, math.inf),
        "Temperature": (temperature, math.inf),
        "Top-k": (top_k, math.inf),
        "Top-p": (top_p, 1),
        "Seed": (seed, 2**63 - 1),
    }
    for name, (value, highest) in settings.items():
        if value is None or not 0 <= value <= highest or math.isinf(value):
            limit = "0 or more" if math.isinf(highest) else f"from 0 to {highest:,}"
            raise ValueError(f"{name} must be {limit}; found {'nothing' if value is None else value}")
    if top_p == 0 or 0 < (temperature or 0) < 1e-6:
        raise ValueError("Top-p must be above 0, and Temperature 0 (greedy decoding) or at least 0.000001")
