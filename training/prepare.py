"""Tokenize a corpus into a shard folder: `python -m training.prepare --corpus installed-docs --output data/docs`.

It can be stopped at any time and run again: it resumes after the last complete shard, and the shards are the same.
`python -m training.prepare --inspect data/docs --verify` describes and checks a folder.
"""

import argparse
import dataclasses
from pathlib import Path

from common.cli_errors import CommandParser, InputError, interrupt_on_sigterm, run_command
from common.typed_values import convert

# The worker processes import this module: heavy imports are inside functions.

DEFAULT_SHARD_TOKENS = 100_000_000


def _boolean(value: str) -> bool:
    try:
        return bool(convert("value", bool, value))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags."""
    parser = CommandParser(
        prog="python -m training.prepare",
        description="Tokenize a corpus into the shards that training reads. Run it again to resume.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_either = parser.add_mutually_exclusive_group(required=True).add_argument
    add_either("--corpus", help="installed-docs, fineweb, fineweb-edu, a file or folder, or a Hub dataset (owner/name)")
    add_either("--inspect", type=Path, metavar="DIR", help="describe a shard folder, made by this or another program")
    add("--output", type=Path, dest="folder", metavar="DIR", help="the shard folder; created if missing")
    add("--verify", action="store_true", help="with --inspect, check every byte: hashes and token ids")
    add("--corpus_config", help="configuration of a Hub dataset; FineWeb's default is sample-10BT")
    add("--text_field", default="text", help="field or column that holds the text in JSON lines and Parquet")
    add(
        "--document_separator",
        default="<|endoftext|>",
        help=r"what separates documents in text files: a line, a text with line breaks such as '\n\n', or none",
    )
    add("--encoding", help="encoding of text without a byte-order mark; UTF-8 if not given")
    add(
        "--tokenizer",
        default="gpt2",
        help="gpt2, train:4096 to train one on the corpus, a folder, or a Hub id",
    )
    add(
        "--split_special_tokens",
        type=_boolean,
        default=True,
        metavar="BOOL",
        help="encode special tokens that the corpus spells, such as <|endoftext|>, as plain text",
    )
    add("--shard_tokens", type=int, default=DEFAULT_SHARD_TOKENS, help="tokens in each training shard")
    add("--val_tokens", type=int, help="tokens in the validation shard; shard_tokens if not given")
    add("--max_tokens", type=int, help="stop after this many training tokens")
    add("--num_workers", type=int, help="tokenizing processes; 0 tokenizes in the main process; all cores if not given")
    return parser


def main() -> None:
    """Run the command."""
    run_command(_run)


def _run() -> None:
    arguments = build_parser().parse_args()
    interrupt_on_sigterm()
    if arguments.inspect is not None:
        from training.data.shards.inspection import inspect

        for line in inspect(arguments.inspect, tokenizer=arguments.tokenizer, verify=arguments.verify):
            print(line)
        return
    if arguments.verify:
        raise InputError("--verify needs --inspect DIR")
    if arguments.folder is None:
        raise InputError("--output is missing; pass the folder to fill")
    if arguments.val_tokens is None:
        arguments.val_tokens = arguments.shard_tokens

    if arguments.document_separator == "none":
        arguments.document_separator = None

    from training.data.producing.producer import produce
    from training.data.shards.shard_spec import ShardSpec

    spec = ShardSpec(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ShardSpec)})
    produce(spec, num_workers=arguments.num_workers, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
