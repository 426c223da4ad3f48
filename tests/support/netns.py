"""A network of namespaces (:mod:`launcher.drill.network`) in which tests start processes, and a Ray cluster on it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.drill import network as base
from launcher.drill.network import available, kill_all, listing
from launcher.host.child import die_with_parent

__all__ = ["Network", "RayCluster", "available", "listing", "network"]


class Network(base.Network):
    """Namespaces in which processes can be started."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._processes: list[subprocess.Popen[bytes]] = []

    def down(self) -> None:
        """Kill every process in the namespaces and remove everything."""
        super().down()
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
        prefix = self.entering(index)
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
        command = [*self.entering(index), *command]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


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
        head_cpus: CPUs of the head, where it has another number.
        redis: ``HOST:PORT`` of a Redis in which the head keeps its tables; empty: in its own memory.
    """

    def __init__(
        self,
        net: Network,
        *,
        token: str = "",
        cpus: int = 2,
        dashboard: bool = False,
        head_cpus: int | None = None,
        redis: str = "",
    ) -> None:
        self.net, self.token, self.cpus, self.dashboard = net, token, cpus, dashboard
        self.head_cpus, self.redis = cpus if head_cpus is None else head_cpus, redis
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
        address, cpus, environment = self.net.addresses[index], self.cpus, self.environment()
        if index == 0:
            cpus = self.head_cpus
            environment |= {"RAY_REDIS_ADDRESS": self.redis} if self.redis else {}
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += ["--num-gpus=0", f"--node-ip-address={address}", f"--temp-dir={self._folder(index)}"]
        command += ["--object-store-memory=83886080", "--disable-usage-stats", "--include-log-monitor=false"]
        if index == 0:
            command += ["--head", "--port=6379", "--no-monitor", f"--include-dashboard={str(self.dashboard).lower()}"]
            command += [f"--dashboard-host={address}"]
        else:
            command += [f"--address={self.address}"]
        self._log(index).unlink(missing_ok=True)
        self.net.popen(index, command, hide=hide, log=self._log(index), env=environment)
        if wait:
            self.wait_up(index)

    def _folder(self, index: int) -> Path:
        """A new folder for each start: Ray takes what an earlier process left there for a cluster that still runs."""
        return next(path for number in itertools.count() if not (path := self.temp / f"{index}-{number}").exists())

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
            kill_all(self.net.namespace(index))
        shutil.rmtree(self.temp, ignore_errors=True)
