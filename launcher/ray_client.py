"""Ray clusters as seen from a process that does not import Ray: authentication, reachability, size, submission.

Whatever needs Ray is done in a short-lived process, which can be given up when a cluster does not answer: inside a
process, Ray waits for half a minute or longer, prints what it thinks of that, and keeps the signal handlers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import launcher
from jobs.paths import RunPaths
from launcher import ray_jobs, ray_order
from launcher.backend import NodeInfo
from launcher.lock import newest_epoch
from launcher.ray_errors import auth_environment
from launcher.ray_node import VISIT, visit
from launcher.store import dump, read_json, write_atomic
from strategies import errors
from strategies.errors import ClusterError, PhalanxError, ResumeRefused, StorageError

REACH_S = 5.0
DESCRIBE_S = 12.0
SUBMIT_S = 120.0
LET_GO_S = 12.0  # for a process that is asked to end: it may have to withdraw an actor and a node


def is_dashboard(address: str) -> bool:
    """Whether an address is that of a dashboard rather than of a Ray head."""
    return address.startswith(("http://", "https://"))


def describe(address: str) -> list[NodeInfo]:
    """The living nodes of a cluster that have devices. Needs no Ray node on this machine.

    Args:
        address: ``IP:PORT`` of the head or ``http(s)://host:8265`` of its dashboard.

    Raises:
        ClusterError: Nothing answers there, it is no Ray cluster, or it refuses us; within about 15 s.
    """
    found = ray_jobs.describe(address) if is_dashboard(address) else describe_all(address)
    return [node for node in found if node.slots]


def describe_all(address: str) -> list[NodeInfo]:
    """All living nodes, those without devices included; like :func:`describe`, for ``IP:PORT`` only."""
    reach(address)
    answer = _ask_ray(["describe", address], DESCRIBE_S, what=f"The Ray cluster at {address} does not answer.")
    return [NodeInfo(**node) for node in answer["nodes"]]


def measure(address: str) -> tuple[int, int]:
    """Number of nodes of a cluster, and of the devices that each of them has (those with fewer are not counted).

    Raises:
        ClusterError: The cluster cannot be reached, or has no devices at all.
    """
    slots = sorted((node.slots for node in describe(address)), reverse=True)
    if not slots:
        raise ClusterError(
            f"The Ray cluster at {address} has no node with a CPU or a GPU.", hint="Add nodes: ray start --address=..."
        )
    # The size that makes most devices usable: nodes have to be equal.
    best = max(set(slots), key=lambda size: size * sum(have >= size for have in slots))
    return sum(have >= best for have in slots), best


def start_controller(
    run_dir: Path, address: str, *, resume: Mapping[str, Any] | None = None, adopt: bool = True
) -> int:
    """Start the detached controller of a run on a running cluster; returns once it has won control.

    Args:
        run_dir: A filled run directory on a file system that every node of the cluster sees under the same path.
        address: ``IP:PORT`` of the head or ``http(s)://host:8265`` of its dashboard.
        resume: A person's wish to continue.
        adopt: A live gang may be taken over as it is.

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
            answer = _ask_ray(["submit", str(paths.root), told], SUBMIT_S, what=what)
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


def _ask_ray(arguments: list[str], timeout_s: float, *, what: str) -> dict[str, Any]:
    """Call a verb of :mod:`launcher.ray_backend` in a process of its own and return its answer."""
    command = [sys.executable, "-P", "-m", "launcher.ray_backend", *arguments]
    environment = os.environ | auth_environment() | {"PYTHONPATH": python_path(), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    with visit() as variables:
        asked = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment | variables,
            cwd=variables[VISIT],
            start_new_session=True,
        )
        try:
            out, complaint = asked.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(
                what,
                why=f"a port is open there, but no Ray head answered within {timeout_s:.0f} s",
                hint="Check that cluster.address is the head's IP:PORT (6379 by default), not a port of another kind.",
            ) from error
        finally:
            let_go(asked)
    return answer_in(out.decode(errors="replace"), complaint.decode(errors="replace"), what=what)


def let_go(asked: subprocess.Popen[bytes]) -> None:
    """End a process that has not ended by itself: it may take back what it has begun, but not take long."""
    try:
        if asked.poll() is None:
            asked.terminate()
            asked.communicate(timeout=LET_GO_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also when the user presses Ctrl-C once more
        if asked.poll() is None:
            os.killpg(asked.pid, signal.SIGKILL)
            asked.wait()
        for pipe in (asked.stdout, asked.stderr):  # what it has started may hold the other ends
            if pipe is not None:
                pipe.close()


def answer_in(output: str, complaint: str = "", *, what: str) -> dict[str, Any]:
    """The last line of ``output`` that is an answer.

    Raises:
        PhalanxError: The answer is an error, which is raised here; or there is none.
    """
    for line in reversed(output.splitlines()):
        with contextlib.suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and "phalanx" in answer:
                if "error" in answer:
                    raise_remote(answer["error"])
                return answer
    last = [line for line in (complaint or output).splitlines() if line.strip()][-1:]
    raise ClusterError(
        what, why="".join(last).strip(), hint="Check that the cluster runs the same Ray and Python versions."
    )


def python_path() -> str:
    """Our packages, before whatever the user has."""
    root = str(Path(str(launcher.__file__)).resolve().parents[1])
    kept = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", root)]
    return os.pathsep.join([root, *kept])


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
