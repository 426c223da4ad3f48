"""Machines made of network namespaces: a bridge, N namespaces with an address each, links that can be cut. Needs root.

The namespaces share processes, users and files with the host, so a folder of the host is a shared file system; one can
be hidden from a node. The bridge has an address too: the host itself is a machine of that network which is no node.
Everything made here carries a prefix with the process id of its owner. It is removed at the end of the context; what a
killed owner left is removed by the next one.
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
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.host.child import die_with_parent
from launcher.lock import process_started

_PREFIX = "phxt"
_HOST = 254
_numbers = itertools.count()  # names and subnets of the networks of this process differ
_LISTS = (("netns", "list"), ("-o", "link"))
_FILES = Path("/etc/netns")  # what "ip netns exec" shows in the place of files of /etc


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
        self.name = f"{_PREFIX}{os.getpid()}{string.ascii_lowercase[number]}"
        subnet = f"10.{100 + (os.getpid() + number) % 100}.{os.getpid() // 100 % 250}"
        self.addresses = [f"{subnet}.{index + 1}" for index in range(count)]
        self.host_address = f"{subnet}.{_HOST}"
        self._subnet = subnet
        self._processes: list[subprocess.Popen[bytes]] = []

    def namespace(self, index: int) -> str:
        """Name of a namespace."""
        return f"{self.name}n{index}"

    def up(self) -> None:
        """Make everything."""
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
            self._name_machines(namespace)

    def _name_machines(self, namespace: str) -> None:
        """Let every address have a name there: torch asks for one at each connection, and no name server answers."""
        names = "".join(f"{address} machine{index}\n" for index, address in enumerate(self.addresses))
        folder = _FILES / namespace
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{names}{self.host_address} outside\n")

    def down(self) -> None:
        """Kill every process in the namespaces and remove everything."""
        remove(self.name, [self.namespace(index) for index in range(len(self.addresses))])
        for process in self._processes:
            process.wait()

    def popen(
        self,
        index: int,
        command: Sequence[str],
        *,
        hide: Path | None = None,
        log: Path,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process in a namespace; the kernel kills it when this process dies.

        Args:
            index: The namespace.
            command: What to run.
            log: Takes what the process prints.
            env: Its whole environment.
            hide: A folder that is empty and its own there, as if it were not shared.
        """
        prefix = ["ip", "netns", "exec", self.namespace(index)]
        if hide is not None:
            prefix += ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hide)]
        parent = os.getpid()
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [*prefix, *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent),
            )
        self._processes.append(process)
        return process

    def run(self, index: int, command: Sequence[str], *, env: dict[str, str], timeout_s: float) -> str:
        """Run a command in a namespace to its end and return what it printed."""
        command = ["ip", "netns", "exec", self.namespace(index), *command]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pids(self, index: int) -> list[int]:
        """Every process in a namespace."""
        return _pids(self.namespace(index))

    def kill(self, index: int) -> None:
        """SIGKILL every process in a namespace, as a power cut would."""
        _kill_all(self.namespace(index))

    def cut(self, index: int) -> None:
        """Pull the cable of a namespace."""
        _ip("link", "set", _cable(self.namespace(index)), "down")

    def mend(self, index: int) -> None:
        """Plug it in again."""
        _ip("link", "set", _cable(self.namespace(index)), "up")


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """A network for as long as the context lasts."""
    made = Network(count)
    try:
        made.up()
        yield made
    finally:
        made.down()


class RayCluster:
    """A Ray cluster on a network that phalanx did not start: node 0 is the head.

    Args:
        net: The network.
        token: The token that it asks for; empty for none.
        cpus: CPUs per node.
        dashboard: The head runs a dashboard.
    """

    def __init__(self, net: Network, *, token: str = "", cpus: int = 2, dashboard: bool = False) -> None:
        self.net, self.token, self.cpus, self.dashboard = net, token, cpus, dashboard
        self.address = f"{net.addresses[0]}:6379"
        self.dashboard_url = f"http://{net.addresses[0]}:8265"
        self.temp = Path(tempfile.mkdtemp(prefix="pxn-", dir="/tmp"))

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Environment of a process that belongs to this cluster, or of one with another token."""
        token = self.token if token is None else token
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        return kept | auth | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_worker_prestart": "0"}

    def start(self, *, nodes: int) -> None:
        """Start the first ``nodes`` nodes and wait until all are up."""
        self.start_node(0)
        for index in range(1, nodes):
            self.start_node(index, wait=False)
        for index in range(1, nodes):
            self.wait_up(index)

    def start_node(self, index: int, *, wait: bool = True, hide: Path | None = None) -> None:
        """Start one node."""
        address = self.net.addresses[index]
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={self.cpus}"]
        command += ["--num-gpus=0", f"--node-ip-address={address}", f"--temp-dir={self.temp / str(index)}"]
        command += ["--object-store-memory=83886080", "--disable-usage-stats", "--include-log-monitor=false"]
        if index == 0:
            command += ["--head", "--port=6379", "--no-monitor", f"--include-dashboard={str(self.dashboard).lower()}"]
            command += [f"--dashboard-host={address}"]
        else:
            command += [f"--address={self.address}"]
        self._log(index).unlink(missing_ok=True)
        self.net.popen(index, command, hide=hide, log=self._log(index), env=self.environment())
        if wait:
            self.wait_up(index)

    def wait_up(self, index: int, timeout_s: float = 60.0) -> None:
        """Wait until a node has joined."""
        deadline = time.monotonic() + timeout_s
        while "Ray runtime started" not in self._log(index).read_text(errors="replace"):
            assert time.monotonic() < deadline, self._log(index).read_text(errors="replace")[-2000:]
            time.sleep(0.1)

    def _log(self, index: int) -> Path:
        return self.temp / f"node-{index}.log"

    def close(self) -> None:
        """Kill all processes of the network; remove files."""
        for index in range(len(self.net.addresses)):
            _kill_all(self.net.namespace(index))
        shutil.rmtree(self.temp, ignore_errors=True)


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
        _kill_all(namespace)
        # The kernel takes its time over a namespace; the outer end of its cable must not outlive the test.
        _quiet("ip", "link", "del", _cable(namespace))
        _quiet("ip", "netns", "del", namespace)
        shutil.rmtree(_FILES / namespace, ignore_errors=True)
    _quiet("ip", "link", "del", name)


def _cable(namespace: str) -> str:
    """The outer end of the link into a namespace."""
    name, _, index = namespace.rpartition("n")
    return f"{name}v{index}"


def _kill_all(namespace: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while (pids := _pids(namespace)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _pids(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split() if process_started(int(pid))]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
