"""How a person's mistake reaches the person: one line and a non-zero exit code, never a traceback.

A module of its own beside the packages that use it: importing the package `gpt2_scratch` imports transformers, which takes
seconds that a mistyped flag, `--help` or a tokenising worker process should not cost.
"""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something that a person gave cannot be used.

    The message is one line: what was expected, what was found, and the way out.
    """


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and turn an `InputError` into one line on standard error and exit code 2.

    Every other exception is a defect of ours and keeps its traceback.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
