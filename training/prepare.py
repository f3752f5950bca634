"""Tokenize a corpus into a shard folder: `python -m training.prepare --corpus installed-docs --output data/docs`.

It can be stopped at any time and run again: it resumes after the last complete shard, and the shards are the same.
`python -m training.prepare --inspect data/docs --verify` describes and checks a folder.
"""

import argparse
import dataclasses
from pathlib import Path

from common.cli_errors import CommandParser, InputError, interrupt_on_sigterm, run_command
from common.typed_values import convert

# The worker processes import this module: other imports are inside functions.

# Keys of a recipe that are flags here too.
_KEYS = (
    *("corpus", "corpus_config", "text_field", "document_separator", "encoding"),
    *("tokenizer", "split_special_tokens", "shard_tokens", "val_tokens"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's flags; values of recipe keys stay strings."""
    from training.recipe import Recipe

    parser = CommandParser(
        prog="python -m training.prepare",
        description="Tokenize a corpus into the shards that training reads. Run it again to resume.",
    )
    add = parser.add_argument
    add_either = parser.add_mutually_exclusive_group(required=True).add_argument
    for key in dataclasses.fields(Recipe):
        if key.name in _KEYS:
            has_default = key.default not in (None, dataclasses.MISSING)
            (add_either if key.name == "corpus" else add)(
                f"--{key.name}",
                default=key.default if has_default else None,
                help=key.metadata["help"] + (f" (default: {key.default})" if has_default else ""),
            )
    add_either("--inspect", type=Path, metavar="DIR", help="describe a shard folder, made by this or another program")
    add("--output", type=Path, dest="folder", metavar="DIR", help="the shard folder; created if missing")
    add("--verify", action="store_true", help="with --inspect, check every byte: hashes and token ids")
    add("--max_tokens", type=int, help="stop after this many training tokens")
    add("--num_workers", type=int, help="tokenizing processes; 0 tokenizes in the main process (default: all cores)")
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
    from training.recipe import field_types

    kinds = field_types()
    values = {name: convert(f"--{name}", kinds[name], getattr(arguments, name)) for name in _KEYS}
    if values["val_tokens"] is None:
        values["val_tokens"] = values["shard_tokens"]

    from training.data.producing.producer import produce
    from training.data.shards.shard_spec import ShardSpec

    spec = ShardSpec(folder=arguments.folder, max_tokens=arguments.max_tokens, **values)
    produce(spec, num_workers=arguments.num_workers, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
