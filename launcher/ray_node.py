"""A Ray node on this machine for as long as a driver needs one; it has no resources and no actor of ours goes there."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from launcher.backend import NodeInfo
from launcher.embedded import NODE_MARK, TEMP_PREFIX, kill_members
from launcher.host import process
from launcher.lock import process_started
from strategies.errors import ClusterError

NODE_START_S = 45.0
NODE_STOP_S = 8.0
VISIT = "PHALANX_VISIT"
"""Environment variable of a process that may start a node: the folder for it, which its parent will clear away."""

VISITOR = ("phalanx-visitor", "true")
"""Label of such a node. Ray puts actors that need no resources anywhere, and the node leaves with its driver."""


@contextlib.contextmanager
def visit() -> Iterator[dict[str, str]]:
    """Variables for a process that may start a node here. Nothing of the two is left at the end, however they ended."""
    base = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    home = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=base))
    mark = f"phalanx-client-{os.getpid()}-{secrets.token_hex(4)}/"
    try:
        (home / "owner").write_text(f"{os.getpid()} {process_started(os.getpid())}")
        yield {NODE_MARK: f"{mark}client", VISIT: str(home)}
    finally:
        kill_members(mark, str(home))
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def local_node(address: str, nodes: Iterable[NodeInfo]) -> Iterator[str]:
    """The address of a Ray node on this machine: a driver cannot do without one.

    When none of the cluster's nodes is here, one without any resources joins for as long as the context lasts.

    Args:
        address: ``IP:PORT`` of the head.
        nodes: All living nodes, those without devices included.

    Raises:
        ClusterError: A node did not start.
    """
    here = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    ids = {word.removeprefix("--node_id=") for pid in process.all_pids() for word in process.command_line(pid)[1:]}
    for node in nodes:
        # The address alone may be that of a node which has just died, the process alone that of another container.
        if node.address in here and node.node in ids:
            yield node.address
            return
    host = address.rpartition(":")[0].strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the kernel picks the address that the cluster sees us by
        own = str(probe.getsockname()[0])
    with _temporary_node(address, own):
        yield own


@contextlib.contextmanager
def _temporary_node(address: str, own: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        known = {name: os.environ[name] for name in (NODE_MARK, VISIT) if name in os.environ}
        variables = known if VISIT in known else stack.enter_context(visit())
        mark = f"{variables[NODE_MARK].rpartition('/')[0]}/node"
        home = Path(variables[VISIT]) / "node"
        home.mkdir()
        node = _start(address, own, home, os.environ | variables | {NODE_MARK: mark})
        stack.callback(_end, node, mark, home)
        _wait_up(node, home)
        yield


def _start(address: str, own: str, home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    options = ["--block", "--num-cpus=0", "--num-gpus=0", f"--address={address}", f"--node-ip-address={own}"]
    options += ["--disable-usage-stats", "--include-log-monitor=false", "--object-store-memory=83886080"]
    options += [f"--labels={'='.join(VISITOR)}", f"--temp-dir={home}"]
    with open(home / "log", "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *options],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=home,
            env=environment,
            start_new_session=True,
        )


def _wait_up(node: subprocess.Popen[bytes], home: Path) -> None:
    deadline = time.monotonic() + NODE_START_S
    while b"Ray runtime started" not in (home / "log").read_bytes():
        if node.poll() is not None or time.monotonic() > deadline:
            last = (home / "log").read_text(errors="replace").strip().splitlines()[-1:]
            raise ClusterError(
                "This machine is not a node of the Ray cluster, and could not join it for the moment.",
                why="".join(last),
                hint="Submit from a node of the cluster, or by its dashboard: cluster.address=http://HOST:8265",
            )
        time.sleep(0.1)


def _end(node: subprocess.Popen[bytes], mark: str, home: Path) -> None:
    node.terminate()  # it takes its leave of the cluster
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(timeout=NODE_STOP_S)
    kill_members(mark, str(home))
    node.wait()
