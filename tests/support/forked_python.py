"""A `python` and an `accelerate` for command lines, whose processes are forked from one that has imported torch.

They stand first in PATH, so that a command runs as printed: the shell, the launcher and all flags are real, and so are
folder, environment, standard streams, signals and exit code. Only the imports, which take longer than most commands,
happen once for all of them.
"""

import contextlib
import json
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path

from support.launching import run_here
from support.processes import FORKED
from support.two_hosts import enter

# Sends what a process is to `_serve`, passes on signals, and ends as the forked process does.
_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
namespace = f"/proc/{{os.getpid()}}/ns/net"
request = [[*{first}, *sys.argv[1:]], os.getcwd(), dict(os.environ), {executable!r}, namespace]
request = json.dumps(request).encode()
socket.send_fds(server, [b"streams"], [0, 1, 2])
server.sendall(len(request).to_bytes(4, "big") + request)
code = int(server.recv(8) or b"1")
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
# Two threads that learn of the end of one process at the same time disturb each other.
_lock = threading.Lock()


@contextlib.contextmanager
def forked_python() -> Iterator[Path]:
    """The folder with both programs."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        name = f"{folder}/bin"
        Path(name).mkdir()
        listener.bind(f"{folder}/socket")
        listener.listen()
        accelerate = str(Path(sys.executable).parent / "accelerate")
        values = {"python": sys.executable, "address": f"{folder}/socket", "executable": f"{name}/python"}
        for program, first in (("python", []), ("accelerate", [accelerate])):
            path = Path(name, program)
            path.write_text(_PROGRAM.format(**values, first=first))
            path.chmod(0o755)
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        yield Path(name)
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed
        while True:
            threading.Thread(target=_serve, args=(listener.accept()[0],), daemon=True).start()


def _serve(client: socket.socket) -> None:
    with client, client.makefile("rb") as reader:
        streams = _Streams(socket.recv_fds(client, 7, 3)[1])
        request = json.loads(reader.read(int.from_bytes(reader.read(4), "big")))
        process = FORKED.Process(target=_run, args=(streams, *request))
        with _lock:
            process.start()
        for descriptor in streams:
            os.close(descriptor)
        while process.sentinel not in wait([process.sentinel, client]):
            number = client.recv(1)
            if number:
                os.kill(process.pid, number[0])
            else:  # the client was killed
                process.kill()
                break
        with _lock:
            process.join()
        with contextlib.suppress(BrokenPipeError):
            client.sendall(str(process.exitcode).encode())


class _Streams(list[int]):
    """File descriptors that a process inherits."""

    def __reduce__(self) -> tuple[object, ...]:
        return _inherited, ([DupFd(descriptor) for descriptor in self],)


def _inherited(descriptors: list[DupFd]) -> list[int]:
    return [descriptor.detach() for descriptor in descriptors]


def _run(
    streams: list[int], command: list[str], folder: str, environment: dict[str, str], executable: str, namespace: str
) -> None:
    if Path(namespace).readlink() != Path("/proc/self/ns/net").readlink():
        enter(namespace)
    os.chdir(folder)
    sys.executable = executable  # of processes that this one starts
    run_here(command, environment, streams, curves=True)
