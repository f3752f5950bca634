"""How this run was launched, for the commands that it prints: they work as printed, on the same processes.

A launcher leaves no trace of its own flags in the processes that it starts, such as the name of its configuration file.
But it waits for them as their parent, and the system tells its command line.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote

import psutil

_SCRIPT = "train.py"
_MODULE = "training.train"


def is_launched() -> bool:
    """Whether `accelerate launch` or `torchrun` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def launch_words() -> list[str]:
    """The command line of this run as far as the training program: `accelerate launch --config_file X.yaml train.py`.

    Ask while the launcher is there. `accelerate launch training/train.py` where `train` is called by another program.
    """
    flags = sys.argv[1:]
    for words in (_parents_words() if is_launched() else [], sys.orig_argv):
        launch, rest = words[: len(words) - len(flags)], words[len(words) - len(flags) :]
        if rest == flags and _ends_with_the_program(launch):
            return _as_typed(launch)
    return [program("accelerate"), "launch", f"training/{_SCRIPT}"]


def program(name: str) -> str:
    """How to call a program of this environment from here, whether the environment is active or not."""
    return _shown(Path(sys.prefix) / "bin" / name)


def continue_command(launch: Sequence[str], output_dir: Path, newest: Path | None) -> str:
    """The command that goes on with a run.

    Arguments:
        launch: how the run was launched (`launch_words`).
        output_dir: its folder.
        newest: the checkpoint that it goes on from; of another folder for a branch that has none of its own yet.
    """
    is_elsewhere = newest is not None and newest.resolve().parent != (output_dir / "checkpoints").resolve()
    # Said even where it is the default: the recipe may have been told another one for its first start.
    wish = quote(str(newest)) if is_elsewhere else "auto"
    return f"{join(launch)} --config {quote(str(output_dir / 'recipe.yaml'))} --resume_from_checkpoint {wish}"


def longer_command(launch: Sequence[str], output_dir: Path, steps: int) -> str:
    """The command that takes a complete run to twice its length."""
    return f"{continue_command(launch, output_dir, None)} --max_steps {2 * steps}"


def _parents_words() -> list[str]:
    try:
        return psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return []


def _ends_with_the_program(words: Sequence[str]) -> bool:
    return Path(sys.argv[0]).name == _SCRIPT and bool(words) and words[-1] in (sys.argv[0], _MODULE)


def _as_typed(words: Sequence[str]) -> list[str]:
    """A command line without the interpreter that the system put before an installed program."""
    first, *others = words
    if others and Path(others[0]).absolute().parent == Path(sys.prefix) / "bin":
        first, *others = others
    return [_shown(Path(first)) if Path(first).is_absolute() else first, *others]


def _shown(path: Path) -> str:
    """A program's path from here where it lies below; else its name, where that finds it."""
    if path.is_relative_to(Path.cwd()):
        return str(path.relative_to(Path.cwd()))
    return path.name if shutil.which(path.name) == str(path) else str(path)
