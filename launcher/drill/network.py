"""Machines made of network namespaces: a bridge, N namespaces with an address each, links that can be cut. Needs root.

The namespaces share processes, users and files with the host, so a folder of the host is a shared file system. The
bridge has an address too: the host itself is a machine of that network which is no node. Everything made here carries a
prefix with the process id of its owner. It is removed at the end of the context; what a killed owner left is removed by
the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Iterator, Sequence

from launcher.lock import process_started
from strategies.errors import ClusterError

_PREFIX = "phxt"
_HOST = 254
_numbers = itertools.count()  # names and subnets of the networks of this process differ
_LISTS = (("netns", "list"), ("-o", "link"))


def available() -> bool:
    """Whether this process may make namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and _quiet("ip", "netns", "list")


class Network:
    """Namespaces on one bridge, numbered from 0.

    Args:
        count: Number of namespaces.

    Attributes:
        addresses: Address of each.
        host_address: Address of the host on the bridge.
    """

    def __init__(self, count: int) -> None:
        number = next(_numbers)
        self.name = f"{_PREFIX}{os.getpid()}{string.ascii_lowercase[number % 26]}"
        subnet = f"10.{100 + (os.getpid() + number) % 100}.{os.getpid() // 100 % 250}"
        self.addresses = [f"{subnet}.{index + 1}" for index in range(count)]
        self.host_address = f"{subnet}.{_HOST}"

    def namespace(self, index: int) -> str:
        """Name of a namespace."""
        return f"{self.name}n{index}"

    def entering(self, index: int) -> list[str]:
        """What to put before a command so that it runs in a namespace."""
        return ["ip", "netns", "exec", self.namespace(index)]

    def up(self) -> None:
        """Make everything.

        Raises:
            ClusterError: The machine refuses.
        """
        sweep()
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.host_address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        for index, address in enumerate(self.addresses):
            namespace, outer = self.namespace(index), _cable(self.namespace(index))
            _ip("netns", "add", namespace)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", outer, "master", self.name, "up")
            _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", namespace, "link", "set", link, "up")
            _ip("-n", namespace, "route", "add", "default", "via", self.host_address)

    def down(self) -> None:
        """Kill every process in the namespaces and remove everything."""
        remove(self.name, [self.namespace(index) for index in range(len(self.addresses))])

    def pids(self, index: int) -> list[int]:
        """Every process in a namespace."""
        return _pids(self.namespace(index))

    def kill(self, index: int) -> None:
        """SIGKILL every process in a namespace, as a power cut would."""
        kill_all(self.namespace(index))

    def cut(self, index: int) -> None:
        """Pull the cable of a namespace."""
        _ip("link", "set", _cable(self.namespace(index)), "down")

    def mend(self, index: int) -> None:
        """Plug it in again."""
        _ip("link", "set", _cable(self.namespace(index)), "up")

    def slow_down(self, index: int, rate: str) -> None:
        """Let the namespace send and receive at most ``rate`` (as ``tc`` writes it: ``8mbit``)."""
        shape = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        _run("tc", "qdisc", "add", "dev", _cable(self.namespace(index)), *shape)
        _run(*self.entering(index), "tc", "qdisc", "add", "dev", "eth0", *shape)

    def packets(self, index: int) -> int:
        """How many packets have gone through the slow end in the namespace; raises ClusterError if there is none."""
        shown = _run(*self.entering(index), "tc", "-s", "qdisc", "show", "dev", "eth0")
        counted = re.search(r"qdisc tbf.*?Sent \d+ bytes (\d+) pkt", shown, re.DOTALL)
        if counted is None:
            raise ClusterError(f"The link of {self.namespace(index)} is not slowed down.")
        return int(counted[1])


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """A network for as long as the context lasts."""
    made = Network(count)
    try:
        made.up()
        yield made
    finally:
        made.down()


def listing() -> list[str]:
    """Namespaces and links that exist, one a line."""
    shown = (subprocess.run(["ip", *what], capture_output=True, text=True, check=True) for what in _LISTS)
    return [line for done in shown for line in done.stdout.splitlines()]


def sweep() -> None:
    """Remove what owners that no longer live have left."""
    listed = "\n".join(listing())
    for name, owner in set(re.findall(rf"({_PREFIX}(\d+)[a-z])", listed)):
        if not process_started(int(owner)):
            remove(name, sorted({*re.findall(rf"{name}n\d+", listed)}))


def remove(name: str, namespaces: Sequence[str]) -> None:
    """Remove namespaces with everything in them, and the bridge."""
    for namespace in namespaces:
        kill_all(namespace)
        # The kernel takes its time over a namespace; the outer end of its cable must not outlive its owner.
        _quiet("ip", "link", "del", _cable(namespace))
        _quiet("ip", "netns", "del", namespace)
    _quiet("ip", "link", "del", name)


def kill_all(namespace: str, timeout_s: float = 10.0) -> None:
    """SIGKILL every process in a namespace until none is left."""
    deadline = time.monotonic() + timeout_s
    while (pids := _pids(namespace)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _cable(namespace: str) -> str:
    """The outer end of the link into a namespace."""
    name, _, index = namespace.rpartition("n")
    return f"{name}v{index}"


def _pids(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split() if process_started(int(pid))]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"The network of the rehearsal: {' '.join(command)} failed.", why=done.stderr.strip())
    return done.stdout


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
