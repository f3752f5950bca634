"""The demo page in gradio: its controls, and what happens when they are used.

This file imports only the other files of the demo, because a Space carries them.
"""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from . import demo_views as views
from .demo_session import Demo, Text

_PAGES_AT_ONCE = 4
_IDLE_SECONDS = 3600  # the text of a page that was left open is dropped
_PROMPT = "Once upon a time"

# Click a token, or move with the arrow keys.
_SELECT_TOKEN = """
function select(token) {
  if (!token) return;
  for (const old of element.querySelectorAll('.g-token.g-selected')) old.classList.remove('g-selected');
  token.classList.add('g-selected');
  token.scrollIntoView({block: 'nearest'});
  trigger('select');
}
element.addEventListener('click', event => select(event.target.closest('.g-token')));
element.addEventListener('keydown', event => {
  const selected = element.querySelector('.g-token.g-selected');
  if (!selected || !['ArrowLeft', 'ArrowRight'].includes(event.key)) return;
  event.preventDefault();
  select(event.key === 'ArrowLeft' ? selected.previousElementSibling : selected.nextElementSibling);
});
"""
_SELECT_HEAD = """
element.addEventListener('click', event => {
  const head = event.target.closest('.g-head');
  if (!head) return;
  for (const old of element.querySelectorAll('.g-head.g-selected')) old.classList.remove('g-selected');
  head.classList.add('g-selected');
  trigger('select');
});
"""
# The selection is read when the request is sent. The data of an event would be that of the first of several quick ones.
_SELECTED_TOKEN = """(state, layer, head, index) =>
  [state, layer, head, Number(document.querySelector('#text .g-token.g-selected')?.dataset.index ?? -1)]"""
_SELECTED_HEAD = "() => Number(document.querySelector('#attention .g-head.g-selected').dataset.head) + 1"


def theme() -> gr.themes.Base:
    """Return the page's theme, which needs no fonts from the network."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def build_page(model: Any, tokenizer: Any, name: str) -> gr.Blocks:
    """Return the page for a model and its tokenizer; launch it with `theme=theme()` and `css=views.CSS`.

    Raises:
        ValueError: the model is not a GPT-2 language model.
    """
    demo = Demo(model, tokenizer)
    config = model.config
    facts = " · ".join(
        (
            f"{model.num_parameters():,} parameters",
            f"{views.counted(config.num_hidden_layers, 'layer')} × {views.counted(config.num_attention_heads, 'head')}",
            f"{config.hidden_size} wide",
            f"{demo.n_positions:,} positions",
            f"{config.vocab_size:,} tokens",
        )
    )
    with gr.Blocks(title=f"{name} · GPT-2", analytics_enabled=False) as page:
        state = gr.State(Text(), time_to_live=_IDLE_SECONDS)
        index = gr.Number(-1, visible=False, precision=0)  # of the selected token, filled in by the browser
        gr.HTML(f'<h1>{views.escape(name)}</h1><p class="g-note">{facts}</p>')
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox(_PROMPT, label="Prompt", lines=4, max_lines=12, elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Complete", variant="primary", min_width=80, elem_id="complete")
                    look = gr.Button("Inspect", min_width=80, elem_id="inspect")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                limit = max(demo.n_positions - 1, 1)
                new_tokens = gr.Slider(1, limit, min(64, limit), step=1, label="New tokens", elem_id="new-tokens")
                temperature = gr.Slider(0, 2, 0.8, step=0.05, label="Temperature", info="0 is greedy decoding")
                top_k = gr.Slider(0, 200, 50, step=1, label="Top-k", info="0 for all tokens")
                top_p = gr.Slider(0.01, 1, 1, step=0.01, label="Top-p")
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
            with gr.Column(scale=2, min_width=400):
                text = gr.HTML(js_on_load=_SELECT_TOKEN, elem_id="text", container=True, padding=True)
                gr.HTML(
                    '<p class="g-note">Select a token, with the mouse or arrow keys, to see what the model thinks.</p>'
                )
                with gr.Tabs():
                    with gr.Tab("Probabilities"):
                        alternatives = gr.HTML(elem_id="alternatives")
                    with gr.Tab("Attention"):
                        with gr.Row():
                            layer = _choice("Layer", config.num_hidden_layers)
                            head = _choice("Head", config.num_attention_heads)
                        heads = gr.HTML(js_on_load=_SELECT_HEAD, elem_id="attention")
                    with gr.Tab("Logit lens"):
                        lens = gr.HTML(elem_id="lens")

        def complete(*settings: Any) -> Iterator[tuple[Text, str]]:
            try:
                for shown in demo.complete(*settings):
                    yield shown, demo.show_text(shown)
            except ValueError as error:
                raise _message(error) from error

        def inspect(written: str) -> Iterator[tuple[Text, str]]:
            yield from complete(written, 0, 0, 0, 1, 0)

        def finish(shown: Text, layer_number: float, head_number: float) -> tuple[Text, str, str, str, str]:
            if not shown.ids:
                return shown, "", "", "", ""
            shown = demo.predict(shown)
            return shown, demo.show_text(shown), *demo.show_selected(shown, layer_number, head_number)

        def select(shown: Text, layer_number: float, head_number: float, index: int) -> tuple[Text, str, str, str]:
            if not 0 <= index < len(shown.ids) or shown.predicted is None:
                raise _message(ValueError("wait for the end of the completion, then select a token"))
            shown = shown._replace(selected=index)
            return shown, *demo.show_selected(shown, layer_number, head_number)

        def attend(shown: Text, layer_number: float, head_number: float) -> str:
            return demo.show_attention(shown, layer_number, head_number) if shown.ids else ""

        settings = [new_tokens, temperature, top_k, top_p, seed]
        private: dict[str, Any] = {"api_visibility": "private"}
        shared: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": _PAGES_AT_ONCE, **private}
        newest: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", **shared}
        panels = [alternatives, heads, lens]
        # Without preprocessing, for which an empty slider is a bug: `check_settings` has a message for it.
        runs = [
            gr.on([go.click], complete, [prompt, *settings], [state, text], preprocess=False, **shared),
            gr.on([look.click], inspect, [prompt], [state, text], **shared),
        ]
        for run in runs:
            run.success(finish, [state, layer, head], [state, text, *panels], **shared)
        stop.click(None, cancels=runs, **private).then(finish, [state, layer, head], [state, text, *panels], **shared)
        text.select(select, [state, layer, head, index], [state, *panels], js=_SELECTED_TOKEN, **newest)
        gr.on([layer.change, head.change], attend, [state, layer, head], heads, **newest)
        heads.select(None, None, head, js=_SELECTED_HEAD, **private)
    return page


def _choice(name: str, count: int) -> gr.Dropdown:
    return gr.Dropdown(list(range(1, count + 1)), value=1, label=name, filterable=False, elem_id=name.lower())


def _message(error: Exception) -> gr.Error:
    return gr.Error(str(error), title="Cannot do that", print_exception=False)
