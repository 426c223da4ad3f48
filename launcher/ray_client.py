"""Ray clusters as seen from a process that does not import Ray: authentication, reachability, size, submission.

Whatever needs Ray is done in a process of its own (:mod:`launcher.ray_process`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher import ray_jobs, ray_order
from launcher.backend import NodeInfo
from launcher.lock import newest_epoch
from launcher.ray_process import RayProcess, is_answer, silent
from launcher.store import dump, read_json, write_atomic
from strategies import errors
from strategies.errors import ClusterError, PhalanxError, ResumeRefused, StorageError

REACH_S = 5.0
DESCRIBE_S = 12.0
SUBMIT_S = 120.0


def is_dashboard(address: str) -> bool:
    """Whether an address is that of a dashboard rather than of a Ray head."""
    return address.startswith(("http://", "https://"))


def describe(address: str, ray: RayProcess | None = None) -> list[NodeInfo]:
    """The living nodes of a cluster that have devices. Needs no Ray node on this machine.

    Args:
        address: ``IP:PORT`` of the head or ``http(s)://host:8265`` of its dashboard.
        ray: Whom to ask; None for a process for this alone.

    Raises:
        ClusterError: Nothing answers there, it is no Ray cluster, or it refuses us; within about 15 s.
    """
    found = ray_jobs.describe(address) if is_dashboard(address) else describe_all(address, ray)
    return [node for node in found if node.slots]


def describe_all(address: str, ray: RayProcess | None = None) -> list[NodeInfo]:
    """All living nodes, those without devices included; like :func:`describe`, for ``IP:PORT`` only."""
    reach(address)
    answer = _ask_ray(["describe", address], DESCRIBE_S, what=f"The Ray cluster at {address} does not answer.", ray=ray)
    return [NodeInfo(**node) for node in answer["nodes"]]


def measure(address: str, ray: RayProcess | None = None) -> tuple[int, int]:
    """Number of nodes of a cluster, and of the devices that each of them has (those with fewer are not counted).

    Raises:
        ClusterError: The cluster cannot be reached, or has no devices at all.
    """
    slots = sorted((node.slots for node in describe(address, ray)), reverse=True)
    if not slots:
        raise ClusterError(
            f"The Ray cluster at {address} has no node with a CPU or a GPU.", hint="Add nodes: ray start --address=..."
        )
    # The size that makes most devices usable: nodes have to be equal.
    best = max(set(slots), key=lambda size: size * sum(have >= size for have in slots))
    return sum(have >= best for have in slots), best


def start_controller(
    run_dir: Path,
    address: str,
    *,
    resume: Mapping[str, Any] | None = None,
    adopt: bool = True,
    ray: RayProcess | None = None,
) -> int:
    """Start the detached controller of a run on a running cluster; returns once it has won control.

    Args:
        run_dir: A filled run directory on a file system that every node of the cluster sees under the same path.
        address: ``IP:PORT`` of the head or ``http(s)://host:8265`` of its dashboard.
        resume: A person's wish to continue.
        adopt: A live gang may be taken over as it is.
        ray: Whom to ask; None for a process for this alone.

    Returns:
        The epoch in which it controls.

    Raises:
        ClusterError: The cluster cannot be reached, refuses us, or could not start the controller.
        StorageError: The run directory is not shared with every node.
        ResumeRefused: Another controller owns the run.
    """
    paths = RunPaths(run_dir.resolve())
    write_atomic(paths.cluster, dump({"version": 1, "kind": "existing", "state": "ready", "address": address}))
    order, told = ray_order.place(paths, address, resume=resume, adopt=adopt)
    before = newest_epoch(paths)
    try:
        if is_dashboard(address):
            answer = ray_jobs.run_entrypoint(address, paths, told, timeout_s=SUBMIT_S)
        else:
            reach(address)  # a quick and short error first
            what = f"The cluster at {address} does not answer."
            answer = _ask_ray(["submit", str(paths.root), told], SUBMIT_S, what=what, ray=ray)
    except BaseException as error:
        # Ray may still start what we asked for, at any time: from here on it must not begin to control.
        if not _withdrawn(paths, order) and isinstance(error, ClusterError) and newest_epoch(paths) > before:
            return newest_epoch(paths)  # only its answer was lost
        raise
    return int(answer["epoch"])


def _withdrawn(paths: RunPaths, order: str) -> bool:
    try:
        return ray_order.withdraw(paths, order)
    except StorageError:
        return True


def raise_remote(error: Mapping[str, str]) -> None:
    """Raise again what another process caught: fields ``kind``, ``what``, ``why`` and ``hint``.

    Raises:
        PhalanxError: Always; of the named kind.
    """
    kind = getattr(errors, error.get("kind", ""), PhalanxError)
    raise kind(error.get("what", "unknown error"), why=error.get("why", ""), hint=error.get("hint", ""))


def as_remote(error: BaseException) -> dict[str, str]:
    """What :func:`raise_remote` takes."""
    if isinstance(error, PhalanxError):
        return {"kind": type(error).__name__, "what": error.what, "why": error.why, "hint": error.hint}
    return {"kind": "PhalanxError", "what": f"{type(error).__name__}: {error}", "why": "", "hint": ""}


def cluster_record(run_dir: Path) -> dict[str, Any]:
    """What ``cluster.json`` of a run says; empty when there is none."""
    try:
        value = read_json(RunPaths(run_dir).cluster)
    except StorageError:
        return {}
    return value if isinstance(value, dict) else {}


def reach(address: str) -> None:
    """Connect to the port, for a quick and short error.

    Raises:
        ClusterError: Nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(
            f"cluster.address={address!r} is not an address.",
            hint="Use IP:PORT of the Ray head (port 6379 by default), or http://HOST:8265 of its dashboard.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        why = "no answer within 5 s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ClusterError(
            f"No Ray cluster can be reached at {address}.",
            why=why,
            hint="Check cluster.address and that the cluster is up: ray status --address ADDRESS",
        ) from error


def _ask_ray(arguments: list[str], timeout_s: float, *, what: str, ray: RayProcess | None = None) -> dict[str, Any]:
    """Call a verb of :mod:`launcher.ray_verbs`, in a process for this alone if ``ray`` is None; returns its answer."""
    with contextlib.nullcontext(ray) if ray is not None else RayProcess() as process:
        return answer_in(process.ask(arguments, timeout_s, what=what), what=what)


def answer_in(output: str, *, what: str) -> dict[str, Any]:
    """The last line of ``output`` that is an answer.

    Raises:
        PhalanxError: The answer is an error, which is raised here; or there is none.
    """
    for line in reversed(output.splitlines()):
        if is_answer(line):
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise_remote(answer["error"])
            return answer
    raise silent(what, "".join([line for line in output.splitlines() if line.strip()][-1:]))


def wait_gone(find: Callable[[], Any], paths: RunPaths, patience_s: float = 10.0) -> None:
    """Wait until an earlier controller actor of the run has left.

    Args:
        find: Looks the actor up; None when there is none.
        paths: The run, which tells whether that controller has given up control: only then it is about to leave.
        patience_s: How long it may take to leave.

    Raises:
        ResumeRefused: It stays.
    """
    newest, run = newest_epoch(paths), paths.root.name
    leaving = not newest or (paths.controllers / f"{newest}.released").exists()
    deadline = time.monotonic() + (patience_s if leaving else 0.0)
    while find() is not None:
        if time.monotonic() > deadline:
            raise ResumeRefused(
                f"The controller of '{run}' lives on the cluster.",
                hint=f"Follow it: phalanx logs {run} -f. To stop it: phalanx cancel {run}",
            )
        time.sleep(0.2)
