"""The child process that fills a shard folder in the background of training; see `background_producer`.

    python -m training.data.producing.producer_process SPEC_AS_JSON NUM_WORKERS

Its worker processes import this module, so heavy imports are inside functions.
"""

import os
import signal
import sys
import threading
import time

from common.cli_errors import run_command

_NICENESS = 5  # training has priority
_SECONDS_TO_CLEAN_UP = 10.0


def main() -> None:
    """Run the command."""
    run_command(_run)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM do what Ctrl-C does, so that partial files are deleted; further ones are ignored."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _run() -> None:
    interrupt_on_sigterm()
    os.nice(_NICENESS)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    from training.data.producing.producer import produce, summarize
    from training.data.shards.shard_spec import ShardSpec

    def report(line: str) -> None:
        print(line, flush=True)

    started = time.perf_counter()
    folder = produce(ShardSpec.from_json(sys.argv[1]), num_workers=int(sys.argv[2]), wait=True, report=report)
    report(summarize(folder, time.perf_counter() - started))


def _exit_with_parent() -> None:
    """Exit once standard input closes: the parent holds its other end until it exits or is killed."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_CLEAN_UP)
    os._exit(1)


if __name__ == "__main__":
    main()
