"""Evaluate a causal language model on tasks of the GPT-2 paper, next to GPT-2's published results.

    python -m evaluation.run --model runs/quickstart/model --tasks hellaswag lambada --output results.json
    python -m evaluation.run --compare a.json b.json

`accelerate launch -m evaluation.run …` distributes the items over processes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli_errors import CommandParser, InputError, run_command
from evaluation.tasks.registry import default_protocols, task_named

DTYPES = ("auto", "float32", "bfloat16", "float16")
CHART_FORMATS = (".png", ".svg", ".pdf")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # Imported late, because torch and transformers take seconds: errors in the command line are reported before that.
    if options.list:
        from evaluation.results.report import protocol_list

        print(protocol_list())
    elif options.compare:
        from evaluation.results.compare import comparison_table
        from evaluation.results.results_file import read_results

        print(comparison_table(*(read_results(path) for path in options.compare)))
    else:
        from evaluation.evaluate_model import evaluate_model

        evaluate_model(options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the checked options; `tasks` are `Task` objects without duplicates."""
    parser = CommandParser(
        prog="python -m evaluation.run", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", help="folder or Hub id of a causal language model and its tokenizer")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--tasks", nargs="+", metavar="TASK", default=[], help="such as hellaswag or hellaswag:harness; see --list")
    add("--limit", type=int, help="evaluate only the first LIMIT items of each task")
    add("--data_dir", type=Path, help="folder with the official raw files, or with shards (default: read the Hub)")
    add(
        "--output", type=Path, help="results.json; the table and the item cache, to resume from, are written next to it"
    )
    add("--save_items", action="store_true", help="include the record of every item in --output, as --compare needs")
    add("--markdown", type=Path, help="file for the table (default: next to --output)")
    add("--plot", type=Path, help="file for a bar chart, .png, .svg or .pdf")
    add("--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: as saved)")
    add(
        "--tokens_per_batch",
        type=int,
        help="maximum tokens per forward pass (default: 4096 on CPU, 16384 otherwise; halved on out-of-memory)",
    )
    add("--trust_remote_code", action="store_true", help="run the code in the model's repository")
    add("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="compare two results by a paired test")
    add("--list", action="store_true", help="list tasks and protocols")
    options = parser.parse_args(arguments)
    if options.list or options.compare:
        return options
    if not options.tasks:
        raise InputError(f"no tasks given; choose --tasks from {', '.join(default_protocols())}")
    options.tasks = list({task.full_name: task for task in map(task_named, options.tasks)}.values())
    if options.model is None:
        raise InputError("no model given; pass --model, a folder or a Hub id")
    for flag in ("limit", "tokens_per_batch"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag} must be at least 1, not {value}")
    if options.save_items and options.output is None:
        raise InputError("--save_items needs --output; pass a file name")
    if options.plot is not None and options.plot.suffix not in CHART_FORMATS:
        raise InputError(f"--plot must end in {', '.join(CHART_FORMATS)}, not {options.plot.name!r}")
    if options.output is not None and options.output.suffix != ".json":
        raise InputError(f"--output must end in .json, not {options.output.name!r}")
    return options


if __name__ == "__main__":
    run_command(main)
