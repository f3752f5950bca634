"""Two hosts on this machine: network namespaces with an address each, and a cable between them that can be disturbed.

The cable is a pair of TUN devices whose packets this process carries from one to the other, so that delay, loss and
interruption need no module of the kernel (`tc netem` is missing in many).
"""

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from pathlib import Path

_TUN_DEVICE = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # from linux/if_tun.h
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_unavailable() -> str | None:
    """Why this machine cannot hold two hosts; None if it can."""
    if shutil.which("ip") is None:
        return "needs the program ip (iproute2)"
    if not os.access(_TUN_DEVICE, os.R_OK | os.W_OK):
        return f"needs {_TUN_DEVICE}"
    name = f"probe-{os.getpid()}"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if added.returncode:
        return f"needs the right to create network namespaces ({added.stderr.strip()})"
    _ip("netns", "delete", name)
    return None


def enter(host: str) -> None:
    """Move this process, which must have a single thread, to a host or the path of a network namespace."""
    namespace = os.open(Path("/run/netns", host), os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):  # os.setns needs Python 3.12
        raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    os.close(namespace)


class Cable:
    """Carries packets between two TUN devices.

    Attributes:
        delay_seconds: of every packet in either direction.
        loss: share of packets that are lost.
        is_down: whether all packets are lost.
    """

    def __init__(self, names: list[str]) -> None:
        self.delay_seconds, self.loss, self.is_down = 0.0, 0.0, False
        self.carried = self.lost = 0
        self._ends = [os.open(_TUN_DEVICE, os.O_RDWR) for _ in names]
        for end, name in zip(self._ends, names, strict=True):
            fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._carry)

    def start(self) -> None:
        self._thread.start()

    def repair(self) -> None:
        """Carry every packet immediately."""
        self.delay_seconds, self.loss, self.is_down = 0.0, 0.0, False

    def close(self) -> None:
        """Stop, and remove both devices."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        for end in self._ends:
            os.close(end)

    def _carry(self) -> None:
        chance, on_the_way = random.Random(0), deque[tuple[float, int, bytes]]()
        while not self._stopped.is_set():
            until_next = on_the_way[0][0] - time.monotonic() if on_the_way else 0.05
            for end in select.select(self._ends, [], [], max(0.0, min(0.05, until_next)))[0]:
                packet = os.read(end, 65_536)
                if self.is_down or chance.random() < self.loss:
                    self.lost += 1
                else:
                    other = self._ends[1 - self._ends.index(end)]
                    on_the_way.append((time.monotonic() + self.delay_seconds, other, packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                _, end, packet = on_the_way.popleft()
                with contextlib.suppress(OSError):  # the other end is not up yet
                    os.write(end, packet)
                    self.carried += 1


class TwoHosts:
    """Names of the namespaces, in the order of `ADDRESSES`, and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"host-{letter}-{os.getpid()}" for letter in "ab"]
        self.cable = Cable([f"tun-{letter}-{os.getpid()}" for letter in "ab"])

    def __enter__(self) -> "TwoHosts":
        for name, letter, address in zip(self.names, "ab", ADDRESSES, strict=True):
            device = f"tun-{letter}-{os.getpid()}"
            _ip("netns", "add", name)
            _ip("link", "set", device, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            for link in ("lo", device):
                _ip("-n", name, "link", "set", link, "up")
        self.cable.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cable.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)
