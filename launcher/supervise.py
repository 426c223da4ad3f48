"""One controller from lock to release, with the tracker beside it. In the foreground or inside a controller actor."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher import adoption
from launcher.backend import AgentAddress, Backend, NodeInfo
from launcher.controller import Controller
from launcher.drill.ambush import Waylaid
from launcher.gang import Gang
from launcher.lock import ControllerLock
from launcher.meter import metering
from launcher.repeated import repeated
from launcher.request import LaunchRequest
from launcher.run import RunEvent, RunState
from launcher.store import RunStore, create_exclusive
from strategies.errors import StorageError

TRACKER_PATIENCE_S = 30.0


def control(
    store: RunStore,
    backend: Backend,
    lock: ControllerLock,
    *,
    resume: Mapping[str, Any] | None = None,
    adopt: bool = True,
    observer: Callable[[RunEvent | None], None] = lambda event: None,
) -> RunState:
    """Keep a run alive until it ends.

    Args:
        store: The run; its ``request.json`` says what to do.
        backend: Where it runs.
        lock: The right to control, already won; released at the end.
        resume: A person's wish to continue (``overrides``, ``changes``).
        adopt: A live gang may be taken over as it is.
        observer: For progress displays.

    Raises:
        launcher.controller.Fenced: Another controller has taken over.
        StorageError: The run directory cannot be written.
    """
    request = store.request()
    gang = Gang(
        secret=store.secret(), epoch=lock.epoch, detect_s=request.recovery.detect_s, lease_s=request.recovery.lease_s
    )
    waylaid = Waylaid(store)

    def seen(event: RunEvent | None) -> None:
        observer(event)
        waylaid.look(controller, event)

    try:
        with _tracker(store.paths, request), metering(store, request), beating(gang, request.recovery.lease_s / 12):
            controller = Controller(store, request, backend, gang=gang, lock=lock, clock=time, observer=seen)
            adoption.begin(controller, resume=resume, adopt=adopt)
            state = controller.follow()
    finally:
        gang.close()
    lock.release()
    return state


def request_cancel(store: RunStore, *, by: str) -> None:
    """Ask whoever controls the run to cancel it. Asking twice is asking once."""
    create_exclusive(store.paths.cancel, json.dumps({"by": by, "time": time.time()}).encode())


def withdraw_cancel(store: RunStore) -> None:
    """Forget an earlier request to cancel: a person resumes the run."""
    if store.paths.cancel.exists():
        number = sum(1 for _ in store.paths.control.glob("cancel-*.json")) + 1
        os.replace(store.paths.cancel, store.paths.control / f"cancel-{number}.json")


def beating(gang: Gang, every_s: float) -> AbstractContextManager[None]:
    """Agents are told that the controller lives while it waits for its disk, which may take longer than their lease."""
    return repeated(gang.beat_aside, every_s, name="beats")


@contextlib.contextmanager
def _tracker(paths: RunPaths, request: LaunchRequest) -> Iterator[None]:
    """The experiment tracker, in a process of its own: whatever befalls it, the run does not notice."""
    if request.tracking.kind == "none":
        yield
        return
    process = _start_tracker(paths)
    try:
        yield
    finally:
        try:
            process.wait(timeout=TRACKER_PATIENCE_S if sys.exc_info()[0] is None else 1.0)
        except subprocess.TimeoutExpired:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5.0)
            process.kill()
            process.wait()


def _start_tracker(paths: RunPaths) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[1])
    try:
        with open(paths.root / "tracking.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "jobs.tracking", str(paths.root)],
                env={**os.environ, "PYTHONPATH": root},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
    except OSError as error:
        raise StorageError(
            f"The experiment tracker cannot be started in {paths.root}.", why=str(error), hint="Or use tracking=none."
        ) from error


class NoCluster:
    """The backend of a run whose cluster is gone: nothing is there, nothing can be had."""

    def nodes(self) -> list[NodeInfo]:
        """None."""
        return []

    def request_agents(self, count: int) -> None:
        """Nobody to ask."""

    def agents(self) -> list[AgentAddress]:
        """None."""
        return []

    def forget(self, agent: AgentAddress) -> None:
        """Nothing to forget."""

    def why_missing(self) -> str:
        """Why nothing is there."""
        return "the cluster of this run is gone"

    def release(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to close."""
