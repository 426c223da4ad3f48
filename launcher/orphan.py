"""Ending a run that nobody controls: by becoming its controller for as long as that takes."""

from __future__ import annotations

import time

from launcher import backends, ending, supervise
from launcher.lock import ControllerLock
from launcher.request import LaunchRequest
from launcher.run import RunState
from launcher.store import RunStore
from strategies.errors import ClusterError

PATIENCE_S = 60.0


def cancel(store: RunStore) -> RunState:
    """End a run that nobody controls.

    Raises:
        ResumeRefused: Somebody controls it after all.
        ClusterError: Its ranks may live on a cluster that cannot be reached. The request to cancel stays.
        StorageError: The run directory cannot be written.
    """
    request = store.request()
    if request.cluster.kind == "existing" and _reached(store, request):
        return _await_end(store, request)
    lock = ControllerLock.acquire(store.paths)
    try:
        with backends.left_over(store, request) as backend:
            return supervise.control(store, backend, lock)
    finally:
        lock.release()


def _reached(store: RunStore, request: LaunchRequest) -> bool:
    """Start a controller on the cluster; False when that is not possible and there is nothing to end there.

    Raises:
        ClusterError: It is not possible, and ranks may be alive there.
    """
    try:
        backends.start_controller(store, request)
    except ClusterError as error:
        attempt = store.run().attempt
        if attempt is None or attempt.ended is not None:
            return False
        raise ClusterError(
            f"'{store.name}' is not cancelled: its ranks may still train, and its cluster cannot be reached.",
            why=ending.in_a_line(error),
            hint=f"The request to cancel stays: phalanx cancel {store.name} when the cluster at "
            f"{request.cluster.address} answers again. If it is gone for good, phalanx resume {store.name} "
            "cluster.address=... goes on elsewhere.",
        ) from error
    return True


def _await_end(store: RunStore, request: LaunchRequest) -> RunState:
    """Until a controller elsewhere has ended the run.

    Raises:
        ClusterError: It takes too long.
    """
    deadline = time.monotonic() + PATIENCE_S + request.recovery.grace_s
    while time.monotonic() < deadline:
        state = store.run().state
        if state.terminal:
            return state
        time.sleep(0.2)
    raise ClusterError(f"'{store.name}' has not ended yet.", hint=f"Look again: phalanx status {store.name}")
