"""python -m training.plots RUN [RUN …] [--output compare.png]

Draws the curves of one run, or of several over each other.
"""

from dataclasses import replace
from pathlib import Path

from common.cli_errors import CommandParser, InputError, run_command


def main() -> None:
    """Draw what the command line names."""
    parser = CommandParser(prog="python -m training.plots", description="Draw the curves of runs over each other.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    parser.add_argument(
        "--output", type=Path, help="picture to write (default: RUN/curves.png, or compare.png for several runs)"
    )
    arguments = parser.parse_args()
    from training.monitoring.plots import Curves, plot_curves  # late: Ctrl-C during the import is no traceback

    runs = [Curves.of(folder) for folder in arguments.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # runs with the same name are labelled by path
        runs = [replace(run, name=str(folder)) for folder, run in zip(arguments.runs, runs, strict=True)]
    output = arguments.output or (arguments.runs[0] / "curves.png" if len(runs) == 1 else Path("compare.png"))
    if output.suffix != ".png":
        raise InputError(f"--output {output}: expected a name that ends with .png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        plot_curves(output, runs)
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror})") from None
    print(output)


if __name__ == "__main__":
    run_command(main)
