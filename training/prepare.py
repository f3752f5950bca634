"""Turn a corpus into a shard folder: `python -m training.prepare --corpus installed-docs --output data/docs`.

May be ended at any time and run again: it goes on behind the last whole shard, and the shards come out the same.
`python -m training.prepare --inspect data/docs --verify` tells what is in a folder.
"""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli_errors import CommandParser, InputError, run_command

if TYPE_CHECKING:
    from training.data.shards.shard_reader import ShardFolder

# The worker processes import this module: what is heavy is imported where it is used.

DEFAULT_SHARD_TOKENS = 100_000_000

_NICENESS_BESIDE_TRAINING = 5
_SECONDS_TO_CLEAN_UP = 10.0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = CommandParser(
        prog="python -m training.prepare",
        description="Tokenise a corpus into the shards that training reads. Run it again to go on where it was ended.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_either = parser.add_mutually_exclusive_group(required=True).add_argument
    add_either("--corpus", help="installed-docs, fineweb, fineweb-edu, a file or folder, or a Hub dataset's owner/name")
    add_either("--inspect", type=Path, metavar="DIR", help="tell what is in a shard folder, anybody's")
    add("--output", type=Path, help="the shard folder; made if absent")
    add("--verify", action="store_true", help="with --inspect, read every byte: hashes and ids")
    add("--corpus_config", help="part of a Hub dataset, such as sample-10BT, its default")
    add("--text_field", default="text", help="field or column that holds the text in JSON lines and Parquet")
    add("--tokenizer", default="gpt2", help="gpt2, train:4096 to train one on the corpus, or the folder of a saved one")
    add("--shard_tokens", type=int, default=DEFAULT_SHARD_TOKENS, help="tokens in each training shard")
    add("--val_tokens", type=int, help="tokens in the validation shard; shard_tokens when not given")
    add("--max_tokens", type=int, help="stop after this many training tokens")
    add("--num_workers", type=int, help="tokenising processes, 0 for none beside this one; a core each when not given")
    add(
        "--beside",
        action="store_true",
        help="work as training wants it: give way to it, wait for another producer, end when standard input closes",
    )
    return parser


def main() -> None:
    """Run the command."""
    run_command(_run)


def _run() -> None:
    """Read the flags, before anything heavy is imported, and do what they say."""
    arguments = build_parser().parse_args()
    signal.signal(signal.SIGTERM, _end)
    if arguments.beside:
        os.nice(_NICENESS_BESIDE_TRAINING)
        threading.Thread(target=_end_with_standard_input, daemon=True).start()
    prepare(arguments)


def _end(*_: object) -> None:
    """End as Ctrl-C does, leaving nothing half-written; once, so that the cleaning up is not disturbed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_standard_input() -> None:
    """End when the process at the other end of the pipe is gone, however it went."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_CLEAN_UP)
    os._exit(1)


def prepare(arguments: argparse.Namespace) -> None:
    """Fill the folder and say what came of it; or tell what is in one."""
    if arguments.inspect is not None:
        from training.data.shards.inspection import inspect

        for line in inspect(arguments.inspect, tokenizer=arguments.tokenizer, verify=arguments.verify):
            print(line)
        return
    if arguments.verify:
        raise InputError("--verify goes with --inspect DIR")
    if arguments.output is None:
        raise InputError("expected the folder to fill, found no --output")
    from training.data.producing.producer import produce

    started = time.perf_counter()
    folder = produce(
        arguments.output,
        corpus=arguments.corpus,
        corpus_config=arguments.corpus_config,
        text_field=arguments.text_field,
        tokenizer=arguments.tokenizer,
        shard_tokens=arguments.shard_tokens,
        val_tokens=arguments.shard_tokens if arguments.val_tokens is None else arguments.val_tokens,
        max_tokens=arguments.max_tokens,
        num_workers=arguments.num_workers,
        wait=arguments.beside,
        report=lambda line: print(line, flush=True),
    )
    print(summary(folder, time.perf_counter() - started))


def summary(folder: "ShardFolder", elapsed_seconds: float) -> str:
    """Return what a folder that `produce` has completed holds, in a line."""
    from training.data.tokenization.tokenizer import Tokenizer

    manifest = folder.manifest
    assert manifest is not None
    ids = folder.val_shard.read()
    bytes_per_token = Tokenizer.load(folder.path).token_byte_lengths()[ids].sum() / len(ids)
    return (
        f"{folder.path}: {len(manifest.shards)} shards, {manifest.documents:,} documents, "
        f"{manifest.tokens:,} tokens of {manifest.tokenizer}, "
        f"{bytes_per_token:.2f} bytes a token in validation, {elapsed_seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
