"""Generation by a random GPT-2 of 124M parameters: with and without a cache, by both classes, and streamed.

    python benchmarks/generation.py [--new_tokens 1015] [--rounds 3]

Without a cache, every token costs a forward pass over all tokens before it; the passes are measured at every 64th
length, and their mean counts for every token. Streaming prints each token like the command `python -m
gpt2_scratch.generate`. The sides take turns; medians.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Before benchmarks/, which Python puts first: its evaluation.py would shadow the package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from step_timing import Geometry, alternate, machine, official, ours, seconds

from gpt2_scratch.generate import CountingStreamer

SPACING = 64  # between the lengths at which passes without a cache are measured


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose further ids are words of four letters."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"{number:04d}" for number in range(vocab_size - len(letters))]
    vocabulary = {token: index for index, token in enumerate([*letters, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0])


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new_tokens", type=int, default=1015)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    geometry = Geometry(12, 12, 768, 50_257, 1024, 1)
    sides = [side.model.eval() for side in (ours(geometry, device), official(geometry, device))]
    sides[1].load_state_dict(sides[0].state_dict())
    ids = torch.randint(geometry.vocab_size, (1, 8), device=device)
    new_tokens = min(arguments.new_tokens, geometry.seq_len - ids.shape[1] - 1)
    tokenizer = byte_tokenizer(geometry.vocab_size)

    def generate(model: torch.nn.Module, **options: object) -> Callable[[], float]:
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        return lambda: seconds(lambda: model.generate(ids, attention_mask=mask, **settings, **options), device)

    def streamed() -> float:
        streamer = CountingStreamer(tokenizer, skip_special_tokens=True)
        with tempfile.TemporaryFile("w") as file, contextlib.redirect_stdout(file):
            return generate(sides[0], streamer=streamer)()

    def without_cache() -> float:
        lengths = range(ids.shape[1], ids.shape[1] + new_tokens, SPACING)
        with torch.no_grad():
            passes = [
                seconds(
                    lambda length=length: sides[0](
                        torch.zeros(1, length, dtype=torch.long, device=device), use_cache=False, logits_to_keep=1
                    ),
                    device,
                )
                for length in lengths
            ]
        return sum(passes) / len(passes) * new_tokens

    with contextlib.redirect_stderr(io.StringIO()):
        alternate([generate(model) for model in sides], 1)  # warm up
    names = ["ours", "GPT2LMHeadModel", "ours, streamed", "ours, without a cache"]
    actions = [*(generate(model) for model in sides), streamed, without_cache]
    times = [statistics.median(each) for each in alternate(actions, arguments.rounds)]
    print(f"{machine(device)}; {new_tokens:,} new tokens; medians of {arguments.rounds} rounds\n")
    print("| side | tokens/s | time of ours |\n| --- | --- | --- |")
    for name, elapsed in zip(names, times, strict=True):
        print(f"| {name} | {new_tokens / elapsed:.1f} | {elapsed / times[0]:.2f}× |")


if __name__ == "__main__":
    main()
