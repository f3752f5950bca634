"""Text from a prompt, printed to the terminal as it is made.

    python -m gpt2_scratch.generate --model openai-community/gpt2 --prompt "Once upon a time"

Any causal language model of the Hub or of a folder works, and so does the folder of a run: its finished model, or else
its newest checkpoint. The text goes to standard output, the speed to standard error.
"""

import argparse
import errno
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import gpt2_scratch  # noqa: F401 - registers model_type gpt2_scratch
from common.cli_errors import CommandParser, InputError, run_command

# What transformers raises for folders whose config, weights or tokenizer cannot be used.
UNREADABLE = (
    *(OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, TypeError),
    *(SafetensorError, StrictDataclassError),
)


class CountingStreamer(TextStreamer):
    """Print text as it is made, and count the new tokens."""

    def __init__(self, tokenizer: Any, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.new_tokens = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt (1, seq) at first, and then every new token (1,)."""
        self.new_tokens += value.numel() if value.dim() == 1 else 0
        super().put(value)


def load(
    model_id: str,
    device: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return the model, in evaluation mode and on `device`, and its tokenizer.

    Args:
        model_id: a folder or a Hub id.
        device: "cpu", "cuda:1".
        revision: branch, tag or commit on the Hub.
        dtype: of the weights; the checkpoint's own when None.
        trust_remote_code: run the code that the folder or repository carries.

    Raises:
        InputError: when there is no such folder or repository, or no model or tokenizer in it.
    """
    if (model_id.startswith((".", "/", "~")) or model_id.count("/") > 1) and not Path(model_id).is_dir():
        raise InputError(f"expected --model to be a folder or Hub id, found no folder {model_id!r}; check the path")
    model_id = model_in_run(model_id)
    found = {}
    # Weights of another shape are reported like missing ones, and refused below.
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype or "auto"}
    for part, auto_class, kwargs in (
        ("causal language model", AutoModelForCausalLM, report),
        ("tokenizer", AutoTokenizer, {}),
    ):
        try:
            found[part] = auto_class.from_pretrained(
                model_id, revision=revision, trust_remote_code=trust_remote_code, **kwargs
            )
        except UNREADABLE as error:
            lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            # The first line of most messages says it, that of a config's field only which field.
            reason = ": ".join(lines) if isinstance(error, StrictDataclassError) else lines[0]
            raise InputError(
                f"expected --model to be a folder or Hub id with a causal language model and its tokenizer, "
                f"found no {part} in {model_id!r}: {reason}"
            ) from error
    (model, info), tokenizer = found.values()
    unfilled = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if unfilled:
        raise InputError(
            f"expected weights in {model_id!r} for the whole model that its config.json describes, found none that fit "
            f"{', '.join(unfilled[:3])} ({len(unfilled)} such weights); take a complete checkpoint"
        )
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"expected --device to be usable here, found {device!r}: {str(error).splitlines()[0]}; try --device cpu"
        ) from error


def model_in_run(model_id: str) -> str:
    """Return where the model of a run's folder is, and any other id or folder as it is.

    That is `model/`, or else the newest checkpoint of a run that is still going or was stopped.
    """
    run = Path(model_id)
    if (run / "config.json").exists() or not (run / "recipe.yaml").is_file():
        return model_id
    steps = sorted(run.glob("checkpoints/step-*/config.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    found = [path.parent for path in (*steps, run / "model" / "config.json") if path.is_file()]
    if not found:
        raise InputError(f"expected a model in the run {model_id!r}, found no checkpoint yet; wait for its first")
    return str(found[-1])


def read_prompt(prompt: str | None) -> str:
    """Return the prompt of the command line, or else all of standard input.

    Raises:
        InputError: when it is not text, or there is none of either.
    """
    if prompt is None and sys.stdin is None:
        raise InputError("expected --prompt or text on standard input, found that it is closed; pass --prompt")
    try:
        prompt = sys.stdin.read().rstrip("\n") if prompt is None else prompt
        prompt.encode()  # bytes of a command line that are no text come as lone surrogates
    except UnicodeError as error:
        raise InputError(f"expected a prompt in UTF-8, found {error}; convert the text") from error
    return prompt


def encode(tokenizer: Any, prompt: str, n_positions: int | None, vocab_size: int) -> Tensor:
    """Return the prompt's token ids (1, seq); an empty prompt becomes the end-of-text token, where documents begin.

    Raises:
        InputError: when no position is left for a new token, the tokenizer has no token to begin with, or is not the
            model's.
    """
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise InputError(
                "expected a prompt, found none, and this tokenizer has no end-of-text token to begin with; "
                "pass --prompt"
            )
        ids = [start]
    if n_positions is not None and len(ids) >= n_positions:
        raise InputError(
            f"expected a prompt of fewer tokens than the model has positions ({n_positions:,}), found {len(ids):,}; "
            "shorten the prompt"
        )
    if max(ids) >= vocab_size:
        raise InputError(
            f"expected the tokenizer to give ids below the model's vocabulary of {vocab_size:,}, found {max(ids):,}; "
            "take the tokenizer that belongs to the model"
        )
    return torch.tensor([ids])


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate as the command line says."""
    try:
        generate(parse(arguments))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(f"expected standard output to take the text, found {error.strerror}; make room") from error


def generate(options: argparse.Namespace) -> None:
    """Load the model and print its texts and the speed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prompt = read_prompt(options.prompt)
    model, tokenizer = load(options.model, options.device)
    n_positions = getattr(model.config, "max_position_embeddings", None)
    vocab_size = model.get_input_embeddings().num_embeddings
    input_ids = encode(tokenizer, prompt, n_positions, vocab_size).to(model.device)

    room = options.max_new_tokens if n_positions is None else n_positions - input_ids.shape[1]
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    new_tokens, stopped, started = 0, "", time.perf_counter()
    for number in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- sample {number + 1} of {options.num_samples}", flush=True)
        torch.manual_seed(options.seed + number)
        # What stands for an empty prompt is a special token, which the tokenizer leaves out by itself.
        streamer = CountingStreamer(tokenizer, skip_prompt=False)
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(options.max_new_tokens, room),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            # A folder's generation config may ask for several, which cannot be printed as they are made.
            num_beams=1,
            num_return_sequences=1,
            **sampling,
        )
        new_tokens += streamer.new_tokens
        if streamer.new_tokens == room < options.max_new_tokens:
            stopped = f"; stopped at n_positions={n_positions}"
    elapsed_seconds = time.perf_counter() - started
    print(
        f"{new_tokens:,} tokens in {elapsed_seconds:.1f} s, {new_tokens / elapsed_seconds:,.1f} tokens/s{stopped}",
        file=sys.stderr,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line.

    Raises:
        InputError: for a number outside its range, or a device that does not exist.
    """
    parser = CommandParser(prog="python -m gpt2_scratch.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a run or a Hub id")
    parser.add_argument("--prompt", help="what the text begins with; standard input when not given")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="sample among so many likeliest tokens; 0 for all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample among the likeliest with this much probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next ones count on")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--device", help="cuda when there is one, else cpu")
    options = parser.parse_args(arguments)

    _check(options.max_new_tokens >= 1, "--max_new_tokens", "at least 1", options.max_new_tokens)
    _check(options.num_samples >= 1, "--num_samples", "at least 1", options.num_samples)
    # Scores divided by much less would overflow.
    usable = options.temperature == 0 or 1e-6 <= options.temperature < math.inf
    _check(usable, "--temperature", "0, or 0.000001 or more", options.temperature)
    _check(options.top_k >= 0, "--top_k", "0 or more", options.top_k)
    _check(0 < options.top_p <= 1, "--top_p", "above 0 and up to 1", options.top_p)
    _check(0 <= options.seed < 2**63, "--seed", "0 or more and below 2**63", options.seed)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(options.device).type
    except RuntimeError as error:
        raise InputError(f"expected --device to be cpu, cuda, cuda:1 or mps, found {options.device!r}") from error
    _check(kind != "meta", "--device", "one that computes", "meta")
    return options


def _check(holds: bool, flag: str, expected: str, found: object) -> None:
    if not holds:
        raise InputError(f"expected {flag} to be {expected}, found {found}")


if __name__ == "__main__":
    run_command(main)
