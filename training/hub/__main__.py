"""`python -m training.hub`."""

from common.cli_errors import run_command
from training.hub.command import main

if __name__ == "__main__":
    run_command(main)
