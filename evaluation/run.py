"""Judge a causal language model on tasks of the GPT-2 paper, beside GPT-2's published figures.

    python -m evaluation.run --model runs/quickstart/model --tasks hellaswag lambada --output results.json
    python -m evaluation.run --compare a.json b.json

`accelerate launch -m evaluation.run …` spreads the items over processes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.cli_errors import CommandParser, InputError, run_command
from evaluation.tasks.registry import default_protocols, task_named
from evaluation.tasks.task_types import Task

DTYPES = ("auto", "float32", "bfloat16", "float16")
CHART_FORMATS = ("png", "svg", "pdf")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # torch and transformers take seconds to import: a mistake on the command line is told before that.
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
    """Return the checked command line; `tasks` are the tasks themselves, each once.

    Raises:
        InputError: a flag, a task or a value that there is not, or flags that do not go together.
    """
    parser = CommandParser(
        prog="python -m evaluation.run", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--model", help="a folder or a Hub id with a causal language model and its tokenizer")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", default=[], help="such as hellaswag, or hellaswag:harness; see --list"
    )
    parser.add_argument("--limit", type=int, help="only the first so many items of each task")
    parser.add_argument(
        "--data_dir", type=Path, help="a folder with the official raw files, or with shards; else the Hub"
    )
    parser.add_argument("--output", type=Path, help="results.json; beside it results.md, and the finished items")
    parser.add_argument("--save_items", action="store_true", help="keep every item in --output, as --compare needs")
    parser.add_argument("--markdown", type=Path, help="where the table goes; beside --output when not given")
    parser.add_argument("--plot", type=Path, help="a bar chart, .png, .svg or .pdf")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they were saved")
    parser.add_argument(
        "--tokens_per_batch",
        type=int,
        help="in a forward pass; by default what the device likes, halved without memory",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the model carries")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="two results, by a paired test"
    )
    parser.add_argument("--list", action="store_true", help="list tasks and protocols")
    options = parser.parse_args(arguments)
    if options.list or options.compare:
        return options
    options.tasks = _tasks(options.tasks)
    if options.model is None:
        raise InputError("expected a model, found none; name a folder or a Hub id by --model")
    for flag in ("limit", "tokens_per_batch"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise InputError(f"expected --{flag} to be at least 1, found {value}")
    if options.save_items and options.output is None:
        raise InputError("expected --output for --save_items, found none; name the file")
    if options.plot is not None and options.plot.suffix.removeprefix(".") not in CHART_FORMATS:
        raise InputError(f"expected --plot to end in .{', .'.join(CHART_FORMATS)}, found {options.plot.name!r}")
    if options.output is not None and options.output.suffix != ".json":
        raise InputError(f"expected --output to end in .json, found {options.output.name!r}")
    return options


def _tasks(names: Sequence[str]) -> list[Task]:
    if not names:
        raise InputError(f"expected tasks, found none; --tasks takes {', '.join(default_protocols())}")
    tasks = {task.full_name: task for task in map(task_named, names)}
    return list(tasks.values())


if __name__ == "__main__":
    run_command(main)
