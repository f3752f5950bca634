"""Generates text from a prompt, and prints it token by token.

    python -m gpt2_scratch.generate --model openai-community/gpt2 --prompt "Once upon a time"

Works with any causal language model in a folder or on the Hub, and with the folder of a run: its finished model, or
else its newest checkpoint. Text goes to standard output, the speed to standard error.

A prompt that fills the model's positions is cropped from the left. `--sliding_window` continues beyond the last
position: the second half of the window is encoded again, at the first positions. So every new token sees at
least half a window, and costs on average a pass over two tokens, not over the window.
"""

import argparse
import contextlib
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
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import gpt2_scratch  # noqa: F401 - registers model_type gpt2_scratch
from common.cli_errors import CommandParser, InputError, run_command

from .inspection import prompt_ids
from .source_folder import LOADING_ERRORS, check_index, looks_like_path, model_in_run

_TOLERANCE = 1e-3  # relative to the largest logit
_TOLERANCE_IN_HALF_PRECISION = 5e-2


class CountingStreamer(TextStreamer):
    """Prints text that comes from one or several calls of generate, and counts the new tokens."""

    new_tokens = 0
    _has_prompt = False

    def put(self, value: Tensor) -> None:
        """Receive the prompt, (1, seq), and then each new token, (1,). Prompts of later calls are not printed."""
        is_prompt = value.dim() == 2
        self.new_tokens += 0 if is_prompt else value.numel()
        if not (is_prompt and self._has_prompt):
            super().put(value)
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing at the end of a call: a character may continue in the next one."""

    def finish(self) -> None:
        """Print what is left."""
        super().end()


def load(
    model_id: str,
    device: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return the model of a folder, run or Hub repository, in evaluation mode on `device`, and its tokenizer.

    `dtype` is that of the weights, by default as in the checkpoint.

    Raises:
        InputError: model or tokenizer cannot be loaded, or the device cannot be used.
    """
    if Path(model_id).is_file():
        raise InputError(
            f"{model_id!r} is a file; convert it with python -m gpt2_scratch.export --model {model_id} --output DIR "
            "--format gpt2_scratch, and pass that folder"
        )
    if looks_like_path(model_id) and not Path(model_id).is_dir():
        raise InputError(f"there is no folder {model_id!r}; check --model")
    model_id = model_in_run(model_id)
    check_index(model_id)
    if revision is not None and Path(model_id).is_dir():
        raise InputError(f"{model_id!r} is a folder, which has no revisions; omit --revision, or pass a Hub repository")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    # Weights of a wrong shape are handled like missing ones.
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype or "auto"}
    model, info = _from_pretrained(AutoModelForCausalLM, "causal language model", model_id, options | report)
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", model_id, options)
    architecture = str((model.config.architectures or [""])[0])
    if architecture.endswith(("Classification", "QuestionAnswering")):
        raise InputError(f"{model_id!r} is a {architecture}, not a language model; use the model it was tuned from")
    unfilled = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if unfilled:
        raise InputError(
            f"weights in {model_id!r} do not fit its config.json: {', '.join(unfilled[:3])} ({len(unfilled)} in total) "
            "missing or of another shape; use a complete checkpoint"
        )
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use --device {device}: {str(error).splitlines()[0]}; try --device cpu") from error


@torch.inference_mode()
def check_model(model: Any, tokenizer: Any) -> None:
    """Raise an `InputError` for a model that would write garbage: broken, not causal, or of another tokenizer."""
    # The sum of each weight, because it needs no memory and is finite only if all values are.
    if not all(weight.sum(dtype=torch.float32).isfinite() for weight in model.parameters()):
        raise InputError("the model's weights hold NaN or infinity; use an earlier checkpoint")
    # Padded vocabularies are larger than the tokenizer; added tokens, such as padding, may have no row.
    vocab_size, tokens = model.get_input_embeddings().num_embeddings, tokenizer.vocab_size
    if tokens > vocab_size:
        raise InputError(
            f"the tokenizer has {tokens:,} tokens, but the model's vocabulary has {vocab_size:,} tokens; use the "
            "tokenizer that belongs to the model"
        )
    causal_logits(model, torch.tensor([[0, 1], [0, 2]], device=model.device))


def causal_logits(model: Any, input_ids: Tensor) -> Tensor:
    """Return the logits of two sequences, (2, seq), that differ in the last token only.

    Raises:
        InputError: the model is not causal: its logits depend on later tokens, as BERT's do without `is_decoder`.
    """
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    if logits_differ(logits[0, :-1], logits[1, :-1]):
        raise InputError(
            "the model is not a causal language model: its predictions depend on later tokens; use a model that was "
            "trained to continue text, or set is_decoder in the config of one that can do both"
        )
    return logits


def logits_differ(one: Tensor, other: Tensor) -> bool:
    """Return whether logits differ by more than rounding; NaN counts as equal."""
    if not one.numel():
        return False
    tolerance = _TOLERANCE if one.dtype == torch.float32 else _TOLERANCE_IN_HALF_PRECISION
    return bool((one.float() - other.float()).abs().max() > tolerance * one.float().abs().max())


def _from_pretrained(auto_class: Any, kind: str, model_id: str, options: dict[str, Any]) -> Any:
    # Without files, transformers makes an empty tokenizer for some types of models.
    files = (file for pattern in ("*token*", "vocab*", "*.model") for file in Path(model_id).glob(pattern))
    if kind == "tokenizer" and Path(model_id).is_dir() and not any(files):
        raise InputError(f"cannot load a tokenizer from {model_id!r}: tokenizer.json is missing; copy it there")
    try:
        return auto_class.from_pretrained(model_id, **options)
    except LOADING_ERRORS as error:
        lines = [line.strip(" :") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # The first line of most messages is enough. For a config error, it only names the field.
        reason = ": ".join(lines) if isinstance(error, StrictDataclassError) else lines[0]
        if isinstance(error, KeyError):  # its message is only the key
            reason = f"a file lacks the key {reason}"
        raise InputError(f"cannot load a {kind} from {model_id!r}: {reason}") from error


def read_prompt(prompt: str | None) -> str:
    """Return the prompt of the command line, or standard input if there is none.

    Raises:
        InputError: standard input is closed, or the prompt is not UTF-8.
    """
    if prompt is None and sys.stdin is None:
        raise InputError("there is no prompt and standard input is closed; pass --prompt")
    try:
        prompt = sys.stdin.read().rstrip("\n") if prompt is None else prompt
        prompt.encode()  # invalid bytes on the command line arrive as lone surrogates
    except UnicodeError as error:
        raise InputError(f"the prompt is not valid UTF-8 ({error}); convert it") from error
    return prompt


def crop(input_ids: Tensor, n_positions: int | None, max_new_tokens: int) -> Tensor:
    """Return the end of a prompt that fills all positions: with room for the new tokens, but at least half a window.

    Raises:
        InputError: the model has a single position.
    """
    length = input_ids.shape[1]
    if n_positions is None or length < n_positions:
        return input_ids
    kept = max(n_positions - max_new_tokens, n_positions // 2)
    if not kept:
        raise InputError("the model has a single position, which leaves no room for a new token; use another model")
    print(
        f"the prompt has {length:,} tokens, but the model has {n_positions:,} positions; the first {length - kept:,} "
        "tokens were dropped",
        file=sys.stderr,
    )
    return input_ids[:, -kept:]


def continue_text(
    model: Any, input_ids: Tensor, max_new_tokens: int, n_positions: int | None, *, sliding_window: bool, **options: Any
) -> None:
    """Generate with `options` of `model.generate`, up to the last position, or beyond it with `sliding_window`."""
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    while max_new_tokens:
        length = input_ids.shape[1]
        room = max_new_tokens if n_positions is None else min(max_new_tokens, n_positions - length)
        mask = torch.ones_like(input_ids)
        output = model.generate(input_ids, attention_mask=mask, max_new_tokens=room, **options)
        max_new_tokens -= room
        if not sliding_window or n_positions is None or output.shape[1] < length + room or int(output[0, -1]) in ends:
            break
        input_ids = output[:, -(n_positions // 2) :]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    try:
        generate(parse(arguments))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(f"cannot write to standard output: {error.strerror}; free space") from error


def generate(options: argparse.Namespace) -> None:
    """Load the model, print its samples and the speed."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prompt = read_prompt(options.prompt)
    model, tokenizer = load(options.model, options.device)
    check_model(model, tokenizer)
    n_positions = getattr(model.config, "max_position_embeddings", None)
    try:
        input_ids = prompt_ids(tokenizer, prompt, None, model.get_input_embeddings().num_embeddings)
    except ValueError as error:
        raise InputError(str(error)) from error
    input_ids = crop(input_ids, n_positions, options.max_new_tokens).to(model.device)

    room = options.max_new_tokens if n_positions is None else n_positions - input_ids.shape[1]
    do_sample = options.temperature > 0
    sampling = {name: getattr(options, name) if do_sample else None for name in ("temperature", "top_k", "top_p")}
    new_tokens, stopped, started = 0, "", time.perf_counter()
    for number in range(options.num_samples):
        if options.num_samples > 1:
            print(f"--- sample {number + 1} of {options.num_samples}", flush=True)
        torch.manual_seed(options.seed + number)
        streamer = CountingStreamer(tokenizer, skip_special_tokens=True)
        continue_text(
            model,
            input_ids,
            options.max_new_tokens,
            n_positions,
            sliding_window=options.sliding_window,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            do_sample=do_sample,
            # A generation config may ask for several sequences, which cannot be streamed.
            num_beams=1,
            num_return_sequences=1,
            **sampling,
        )
        streamer.finish()
        new_tokens += streamer.new_tokens
        if streamer.new_tokens == room < options.max_new_tokens:
            stopped = f"; stopped at n_positions={n_positions}, --sliding_window continues"
    seconds = time.perf_counter() - started
    print(f"{new_tokens:,} tokens in {seconds:.1f} s, {new_tokens / seconds:,.1f} tokens/s{stopped}", file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked options of the command line.

    Raises:
        InputError: a value is out of range, or the device does not exist.
    """
    parser = CommandParser(prog="python -m gpt2_scratch.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, a run or a repository on the Hub")
    parser.add_argument("--prompt", help="start of the text (default: read standard input)")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--sliding_window",
        action="store_true",
        help="continue beyond the model's positions, from the last half of them",
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy decoding")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k most likely tokens; 0 for all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the most likely tokens of this total mass"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample; +1 for each further sample")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    options = parser.parse_args(arguments)

    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = "meta"
    with contextlib.suppress(RuntimeError):
        device = torch.device(options.device).type
    for flag, is_valid, expected in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("num_samples", options.num_samples >= 1, "at least 1"),
        # Logits divided by a smaller temperature would overflow.
        ("temperature", options.temperature == 0 or 1e-6 <= options.temperature < math.inf, "0, or 0.000001 or more"),
        ("top_k", options.top_k >= 0, "0 or more"),
        ("top_p", 0 < options.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= options.seed < 2**63, "between 0 and 2**63 - 1"),
        ("device", device != "meta", "cpu, cuda, cuda:1 or mps"),
    ):
        if not is_valid:
            raise InputError(f"expected --{flag} to be {expected}, found {getattr(options, flag)}")
    return options


if __name__ == "__main__":
    run_command(main, output_is_result=True)
