"""Opens a local page that completes prompts and shows what a GPT-2 thinks at each token.

    python -m gpt2_scratch.demo --model runs/quickstart

The page shows the probability of each token and its likeliest alternatives, attention by layer and head, and the logit
lens. It needs the package gradio (the extra `demo`). Nothing is sent to other machines.
"""

import argparse
import os
import socket
from collections.abc import Sequence

import torch
import transformers

from common.cli_errors import CommandParser, InputError, run_command

from .generate import load


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at its import
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise InputError("the demo needs the package gradio: pip install -c constraints.txt -e '.[demo]'") from None
    from . import demo_page
    from .demo_views import CSS

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load(options.model, options.device)
    try:
        page = demo_page.build_page(model, tokenizer, options.model)
    except ValueError as error:
        raise InputError(str(error)) from error
    page.launch(
        server_name=options.host,
        server_port=options.port,
        inbrowser=options.open,
        theme=demo_page.theme(),
        css=CSS,
        footer_links=["settings"],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{options.model} is at {page.local_url} (Ctrl-C stops it)", flush=True)
    page.block_thread()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked options of the command line.

    Raises:
        InputError: a value is out of range, or the page cannot be served there.
    """
    parser = CommandParser(prog="python -m gpt2_scratch.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a run or a repository on the Hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines see the page")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65_535:
        raise InputError(f"expected --port to be from 1 to 65535, found {options.port}")
    try:
        with socket.create_server((options.host, options.port or 0)):
            pass
    except OSError as error:
        where = f"{options.host}, port {options.port}" if options.port else options.host
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else "unknown host"
        raise InputError(f"cannot listen on {where} ({reason}); choose another --host or --port") from error
    return options


if __name__ == "__main__":
    run_command(main)
