"""The cluster's side of a submission: is the run directory shared, then a detached controller. Ends at once.

Runs as a process of its own on the client's machine, or as the entrypoint of a Ray job on the cluster.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher import ray_backend, ray_order
from launcher.backends import agent_options
from launcher.host import announce
from launcher.lock import newest_epoch
from launcher.ray_client import is_dashboard, raise_remote
from launcher.ray_jobs import not_shared
from launcher.store import RunStore
from strategies.errors import ClusterError

SHARED_S = 30.0
CONTROL_S = 60.0
PLACED_S = 3.0
ANNOUNCED_S = 10.0


def submit(run_dir: Path, order: str) -> dict[str, Any]:
    """Carry out the order of :func:`launcher.ray_client.start_controller`.

    Raises:
        ClusterError: The cluster did not start the controller.
        StorageError: The run directory is not shared.
        ResumeRefused: Another controller owns the run.
    """
    what = json.loads(order)
    address = "" if is_dashboard(what["address"]) else what["address"]
    with ray_backend.connected(run_dir, address), _agents_ahead(run_dir) as proven:
        check_shared(run_dir, what["nonce"], besides=proven)
        return _start(run_dir, what)


@contextlib.contextmanager
def _agents_ahead(run_dir: Path) -> Iterator[frozenset[str]]:
    """Start the agents of a new run before its controller: their pools warm up, which takes longest, meanwhile.

    The controller finds them as it would find its own. If none comes of it, they are ended and nothing stays reserved.

    Yields:
        The nodes whose agents have announced themselves in the run directory.
    """
    paths = RunPaths(run_dir)
    if newest_epoch(paths):
        yield frozenset()  # somebody has controlled it before: what is there is the next controller's to judge
        return
    request = RunStore.open(run_dir).request()
    backend = ray_backend.RayBackend(run_dir, request.cluster, agent_options=agent_options(request))
    wanted = request.cluster.nodes + request.cluster.spares
    try:
        backend.request_agents(wanted)
        deadline = time.monotonic() + PLACED_S
        while backend.starting < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
            backend.request_agents(wanted)
        deadline = time.monotonic() + ANNOUNCED_S
        while len(announced := announce.read_all(paths)) < backend.starting and time.monotonic() < deadline:
            if backend.complaint():
                break
            time.sleep(0.02)
        yield frozenset(agent.node for agent in announced)
    except BaseException:
        if not newest_epoch(paths):
            backend.release()
        raise


def _start(run_dir: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """Create the controller and wait for its word; one that does not give it is not left behind."""
    paths = RunPaths(run_dir)
    before = newest_epoch(paths)
    actor = ray_backend.create_controller(run_dir, what["resume"], what["adopt"], what["nonce"])
    try:
        outcome = ray_backend.ask(actor, "outcome", CONTROL_S, timeout_s=CONTROL_S + 30.0)
        if outcome is None:
            raise ClusterError(
                f"The controller of '{run_dir.name}' did not win control within {CONTROL_S:.0f} s.",
                hint=f"phalanx status {run_dir.name}",
            )
    except BaseException as error:  # a signal of the client's comes as SystemExit
        if ray_order.withdraw(paths, what["nonce"]):
            ray_backend.kill(actor)
        elif isinstance(error, ClusterError) and newest_epoch(paths) > before:
            return {"epoch": newest_epoch(paths)}  # it controls; only its answer was lost
        raise
    if "kind" in outcome:
        raise_remote(outcome)
    return dict(outcome)


def check_shared(run_dir: Path, nonce: str, *, besides: Collection[str] = ()) -> None:
    """Every node must read what the client wrote, and be able to write.

    Args:
        run_dir: The run directory.
        nonce: Name and content of the client's order.
        besides: Nodes that have proven it already: their agents have read the run's secret there, and announced
            themselves where we have read it.

    Raises:
        StorageError: A node does not; named with its address.
    """
    root = RunPaths(run_dir).control / ray_order.FOLDER
    answers = ray_backend.run_everywhere(_probe_of(str(root), nonce), timeout_s=SHARED_S, besides=besides)
    for address, complaint in sorted(answers.items()):
        if complaint:
            raise not_shared(run_dir, f"the node {address}", complaint)


def _probe_of(folder: str, nonce: str) -> Callable[[], str]:
    def probe() -> str:
        # Sent by value, and complete in itself: where the folder is missing, our packages are missing too.
        import os
        import socket

        try:
            with open(os.path.join(folder, nonce)) as file:
                if file.read() != nonce:
                    return "it reads something else there"
            own = os.path.join(folder, f"{nonce}-{socket.gethostname()}-{os.getpid()}")
            with open(own, "w") as file:
                file.write(nonce)
            os.unlink(own)
        except OSError as error:
            return str(error)
        return ""

    return probe
