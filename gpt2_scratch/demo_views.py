"""HTML of the demo page: a text with its tokens, and what the model thinks at one of them.

Every function is pure and returns HTML in which the text is escaped. Colors follow the page's theme, light or dark.
This file imports no file of ours but `inspection`, because a Space carries both.
"""

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .inspection import Predictions

CSS = Path(__file__).with_name("demo.css").read_text(encoding="utf-8")
SURPRISING_BITS = 12.0  # a token of this surprisal, or more, gets the full tint
_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
_CONTROL = {chr(code) for code in (*range(32), 127)} - {"\n", "\t"}
_PICTURE_PIXELS = 256  # longer texts are scaled down: a pixel has the largest weight in its block
_THUMBNAIL_PIXELS = 64
_STRONGEST = 8
_LIKELIEST = 4


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; parts of a character are shown as ‹E3 81›, control characters as ‹00›."""
    texts = []
    for token_id in ids:
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        letters = str(tokenizer.convert_ids_to_tokens(token_id))
        if "\ufffd" in text and all(letter in _BYTE_OF for letter in letters):
            text = "‹" + " ".join(f"{_BYTE_OF[letter]:02X}" for letter in letters) + "›"
        texts.append("".join(f"‹{ord(letter):02X}›" if letter in _CONTROL else letter for letter in text))
    return texts


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 layer" or "12 layers"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def escape(text: str) -> str:
    """Return text for HTML that is inserted into a template with ${…} and {{…}}."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")


def text_view(
    texts: Sequence[str], prompt_tokens: int, predicted: Predictions | None = None, selected: int | None = None
) -> str:
    """Return the text as tokens to select, tinted by surprisal if it is `predicted`.

    The user wrote the first `prompt_tokens`.
    """
    spans = []
    for index, text in enumerate(texts):
        classes = ["g-token", "g-prompt" if index < prompt_tokens else "g-new"]
        style = title = ""
        if predicted is not None and index > 0:
            probability = float(predicted.probabilities[index - 1])
            style = f' style="--tint:{_tint(probability):.0f}%"'
            title = f' title="{_percent(probability)}, rank {int(predicted.ranks[index - 1]):,}"'
        if index == selected:
            classes.append("g-selected")
        spans.append(f'<span class="{" ".join(classes)}" data-index="{index}"{style}{title}>{_marked(text)}</span>')
    return f'<div class="g-text" tabindex="0" role="group" aria-label="Tokens">{"".join(spans)}</div>'


def alternatives_view(
    ids: Sequence[int], texts: Sequence[str], top_texts: Sequence[str], predicted: Predictions, selected: int
) -> str:
    """Return the prediction for token `selected` (1 … seq): its probability, and the likeliest tokens, `top_texts`.

    Token seq is the one after the text.
    """
    row = selected - 1
    if selected < len(texts):
        probability, rank = float(predicted.probabilities[row]), int(predicted.ranks[row])
        facts = (
            f"{_chip(texts[selected])} has probability <b>{_percent(probability)}</b>, rank <b>{rank:,}</b>, "
            f"surprisal <b>{_bits(probability):.1f} bits</b>"
        )
    else:
        facts = "The token after the text"
    actual = ids[selected] if selected < len(ids) else None
    bars = [
        _bar(text, float(probability), is_actual=int(token) == actual)  # tokens may have the same text or rank
        for token, text, probability in zip(
            predicted.top_ids[row], top_texts, predicted.top_probabilities[row], strict=True
        )
    ]
    return (
        f'<p class="g-facts">{facts}</p><table class="g-bars"><caption>The model\'s likeliest tokens here</caption>'
        f"{''.join(bars)}</table>"
    )


def summary_view(predicted: Predictions) -> str:
    """Return one line on a text: how many tokens, and how well the model predicts them."""
    scored = predicted.probabilities.numel()
    if scored == 0:
        return '<p class="g-note">1 token: write more to see how well the model predicts it.</p>'
    bits = sum(_bits(float(probability)) for probability in predicted.probabilities) / scored
    first = int((predicted.ranks == 1).sum())
    return (
        f'<p class="g-note">{scored + 1:,} tokens · {bits:.2f} bits per token · perplexity {2**bits:,.1f} · '
        f"the likeliest token {first:,} of {scored:,} times"
        '<span class="g-legend">expected <i></i> surprising</span></p>'
    )


def attention_view(texts: Sequence[str], weights: Tensor, head: int, selected: int) -> str:
    """Return where token `selected` attends to in one head, with the pictures of all heads of the layer.

    `weights` are those of the layer, (n_head, seq, seq).
    """
    row = weights[head, selected, : selected + 1]
    largest = max(float(row.max()), 1e-9)
    spans = [
        f'<span class="g-token" style="--tint:{100 * float(weight) / largest:.0f}%" title="{_percent(float(weight))}">'
        f"{_marked(text)}</span>"
        for text, weight in zip(texts, row, strict=False)
    ]
    strongest = row.topk(min(_STRONGEST, len(row)))
    bars = [
        _bar(texts[index], float(weight), note=f"position {int(index)}")
        for weight, index in zip(strongest.values, strongest.indices, strict=True)
    ]
    heads = [
        f'<button type="button" class="g-head{" g-selected" if number == head else ""}" data-head="{number}" '
        f'title="Head {number + 1}">{_picture(matrix, _THUMBNAIL_PIXELS)}<span>{number + 1}</span></button>'
        for number, matrix in enumerate(weights)
    ]
    marker = f'<i class="g-row" style="top:{100 * selected / len(weights[head]):.2f}%"></i>'
    return (
        f'<p class="g-facts">Head {head + 1}: {_chip(texts[selected])} attends to</p>'
        f'<div class="g-text">{"".join(spans)}</div>'
        f'<div class="g-columns"><table class="g-bars"><caption>Strongest weights; each row sums to one</caption>'
        f'{"".join(bars)}</table><figure><div class="g-matrix">{_picture(weights[head], _PICTURE_PIXELS)}{marker}</div>'
        f"<figcaption>Each row is an attending token; the line marks the selected one. Tint: square root of the "
        f'weight.</figcaption></figure></div><p class="g-facts">All heads of this layer</p>'
        f'<div class="g-heads">{"".join(heads)}</div>'
    )


def lens_view(probabilities: Tensor, ids: Sequence[int], texts_of: Callable[[Sequence[int]], list[str]]) -> str:
    """Return the table of what each layer predicts at each position.

    Args:
        probabilities: (n_layer + 1, positions, vocab_size), from `logit_lens`.
        ids: of the tokens at these positions, and of the one that follows, unless the text ends there.
        texts_of: gives the text of each token.
    """
    texts, positions = texts_of(ids), range(probabilities.shape[1])
    follow = [*map(_one_line, texts[1:]), "<i>end</i>"][: len(positions)]
    best = probabilities.max(dim=-1)
    rows = []
    for layer in reversed(range(len(probabilities))):
        cells = []
        likeliest = best.indices[layer].tolist()
        for index, token, text in zip(positions, likeliest, texts_of(likeliest), strict=True):
            title, name = _percent(float(best.values[layer, index])), ""
            if index + 1 < len(ids):
                title += f"; {texts[index + 1]!r} has {_percent(float(probabilities[layer, index, ids[index + 1]]))}"
                name = "g-actual" if token == ids[index + 1] else ""
            style = f'style="--tint:{100 * float(best.values[layer, index]):.0f}%"'
            cells.append(f'<td class="{name}" {style} title="{escape(title)}">{_one_line(text)}</td>')
        rows.append(f"<tr><th>{_layer(layer)}</th>{''.join(cells)}</tr>")
    header, footer = "".join(f"<th>{_one_line(texts[i])}</th>" for i in positions), "</td><td>".join(follow)
    return (
        '<p class="g-facts">The positions up to this one</p><p class="g-note">A row is what the residual stream after '
        "that layer would predict. Outlined: the token that does follow. Tint: probability.</p>"
        f'<div class="g-scroll"><table class="g-lens"><thead><tr><th>token</th>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot><tr><th>follows</th><td>{footer}</td></tr></tfoot></table></div>"
    )


def layers_view(probabilities: Tensor, token: int | None, texts_of: Callable[[Sequence[int]], list[str]]) -> str:
    """Return how the prediction of one token forms from layer to layer.

    Args:
        probabilities: (n_layer + 1, vocab_size), of the embedding and each layer.
        token: the token; None after the end of the text.
        texts_of: gives the text of each token.
    """
    rows = []
    for layer, values in reversed(list(enumerate(probabilities))):
        best, own = values.topk(_LIKELIEST), ""
        shown = zip(texts_of(best.indices.tolist()), best.values.tolist(), strict=True)
        chips = "".join(f'<span class="g-likely">{_chip(text)} {_percent(value)}</span>' for text, value in shown)
        if token is not None:
            own = f"<td>{_percent(float(values[token]))}</td><td>{int((values > values[token]).sum()) + 1:,}</td>"
        rows.append(f"<tr><th>{_layer(layer)}</th>{own}<td>{chips}</td></tr>")
    own, facts = "", "After the text"
    if token is not None:
        chip = _chip(texts_of([token])[0])
        own, facts = f"<th>{chip}</th><th>rank</th>", f"How the prediction of {chip} forms"
    return (
        f'<p class="g-facts">{facts}</p><div class="g-scroll"><table class="g-layers"><thead><tr><th></th>{own}'
        f"<th>likeliest tokens</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _layer(number: int) -> str:
    return f"layer {number}" if number else "embedding"


def _bits(probability: float) -> float:
    return -math.log2(max(probability, 1e-38))


def _tint(probability: float) -> float:
    """Return the tint of a token in percent: none if it was certain, full at `SURPRISING_BITS`."""
    return 100 * min(_bits(probability) / SURPRISING_BITS, 1.0)


def _percent(probability: float) -> str:
    return f"{100 * probability:.2f}%" if probability >= 0.0001 else f"{100 * probability:.0e}%"


def _marked(text: str) -> str:
    """Return a token's text; line breaks are marked, and still break the line."""
    return escape(text).replace("\n", '<span class="g-break"></span>\n')


def _one_line(text: str) -> str:
    """Return a token with visible spaces and line breaks."""
    return escape(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))


def _chip(text: str) -> str:
    return f'<code class="g-chip">{_one_line(text)}</code>'


def _bar(text: str, value: float, *, is_actual: bool = False, note: str = "") -> str:
    name = ' class="g-actual"' if is_actual else ""
    note = f"<td>{escape(note)}</td>" if note else ""
    bar = f'<td class="g-bar"><i style="width:{100 * value:.2f}%"></i></td>'
    return f"<tr{name}><th>{_chip(text)}</th>{bar}<td>{_percent(value)}</td>{note}</tr>"


def _picture(weights: Tensor, pixels: int) -> str:
    """Return an attention matrix (seq, seq) as an image whose opacity is the square root of the weight."""
    if len(weights) > pixels:
        weights = torch.nn.functional.adaptive_max_pool2d(weights[None], pixels)[0]
    opacity = (255 * weights.clamp(0, 1).sqrt()).round().to(torch.uint8).numpy()
    image = Image.new("RGBA", opacity.shape[::-1], (234, 106, 32, 0))
    image.putalpha(Image.fromarray(opacity))
    file = io.BytesIO()
    image.save(file, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
