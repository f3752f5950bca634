"""Runs of one or several processes that can be killed or sent signals, and that start in a fraction of a second.

Importing torch and transformers takes seconds. Here one process imports them, and all others are forked from it
(`multiprocessing`'s forkserver), with the environment that `torchrun` would set.
"""

import datetime
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from support.fast_runs import speed_up
from support.two_hosts import enter

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["training.loop", "gpt2_scratch", "matplotlib.pyplot", "training.monitoring.plots"])


class ProcessesOfARun:
    """The processes of one start of a run, in the order of their ranks.

    Args:
        recipe: path of the recipe's YAML file; a list makes each process a separate node.
        number: of processes.
        printed: file to which all output is appended.
        timeout_seconds: how long processes wait for each other; as in training if None.
        hosts: network namespaces of the nodes, the first of which has `address`.
    """

    def __init__(
        self,
        recipe: Path | list[Path],
        number: int,
        printed: Path,
        *,
        timeout_seconds: float | None = None,
        hosts: list[str] | None = None,
        address: str = "127.0.0.1",
    ) -> None:
        self.printed = printed
        port = free_port()
        recipes = recipe if isinstance(recipe, list) else [recipe] * number
        self.processes: list[ForkServerProcess] = []
        for rank, path in enumerate(recipes):
            local = ("0", "1") if isinstance(recipe, list) else (str(rank), str(number))
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(number),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            environment |= {"LOCAL_RANK": local[0], "LOCAL_WORLD_SIZE": local[1], "ACCELERATE_USE_CPU": "true"}
            host = hosts[rank] if hosts else None
            arguments = (str(path), environment if number > 1 else {}, str(printed), timeout_seconds, host)
            self.processes.append(FORKED.Process(target=_train, args=arguments))
        for process in self.processes:
            process.start()

    @property
    def alive(self) -> bool:
        """Whether any process is running."""
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some processes, or to all."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, number)

    def kill(self) -> None:
        """Kill all processes."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 120.0) -> list[int | None]:
        """Wait for all processes, and return their exit codes: 143 after SIGTERM, as in a shell."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.alive:
            self.send(signal.SIGABRT)  # prints where they wait
            for process in self.processes:
                process.join(5.0)
            self.send(signal.SIGKILL)
            raise TimeoutError(f"the run did not end in {timeout} s; it printed:\n{self.printed.read_text()}")
        return [process.exitcode for process in self.processes]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _train(
    recipe: str, environment: dict[str, str], printed: str, timeout_seconds: float | None, host: str | None
) -> None:
    if host is not None:
        enter(host)
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.enable()
    os.environ |= environment
    from common.cli_errors import run_command
    from training.loop import train
    from training.recipe import load_recipe
    from training.setup import accelerator

    if timeout_seconds is not None:
        accelerator.PROCESS_TIMEOUT = datetime.timedelta(seconds=timeout_seconds)
    speed_up(pytest.MonkeyPatch().setattr)
    run_command(lambda: train(load_recipe(Path(recipe))))
