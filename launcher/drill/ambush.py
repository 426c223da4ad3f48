"""A controller that kills itself at a place of its own table: nobody else could hit it there.

``control/ambush.json`` in the run directory says where. As the faults of ranks, it happens once in a run, and its proof
is durable before it acts: whoever controls the run next records it.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from launcher.controller import Controller
from launcher.run import EventKind, RunEvent
from launcher.store import RunStore, create_exclusive, dump, read_json, write_atomic
from strategies.codec import from_json

NAME = "controller_kill"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ambush:
    """Where a controller dies.

    Attributes:
        phase: ``gather``, ``run``, ``stop`` or ``backoff``: at the end of a turn in that phase. ``end``: the end of
            the run is recorded, and nothing is given back yet.
        step: Not before the ranks have completed this step.
    """

    phase: str
    step: int = 0


def lay(store: RunStore, ambush: Ambush) -> None:
    """Prepare it, before the run starts.

    Raises:
        StorageError: The run directory cannot be written.
    """
    write_atomic(store.paths.ambush, dump(ambush))


class Waylaid:
    """Looks at the controller in every turn, and kills it where the run directory says so.

    Args:
        store: The run.

    Raises:
        StorageError: ``ambush.json`` is damaged.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        paths = store.paths
        self._ambush = from_json(Ambush, read_json(paths.ambush)) if paths.ambush.exists() else None
        self._proof = paths.faults / f"{NAME}.{self._ambush.phase}.json" if self._ambush else None

    def look(self, controller: Controller, event: RunEvent | None) -> None:
        """Kill this process if the time has come."""
        if self._ambush is None or self._proof is None or self._proof.exists():
            return
        if self._reached(controller, event, self._ambush) and self._prove(controller, self._ambush):
            os.kill(os.getpid(), signal.SIGKILL)

    def _reached(self, controller: Controller, event: RunEvent | None, ambush: Ambush) -> bool:
        if ambush.phase == "end":
            return event is not None and event.kind is EventKind.RUN_SUCCEEDED
        attempt, state = controller.run.attempt, controller.state
        done = max(attempt.last_step if attempt else 0, state.last_step if state else 0)
        return event is None and controller.phase.value == ambush.phase and done >= ambush.step

    def _prove(self, controller: Controller, ambush: Ambush) -> bool:
        assert self._proof is not None
        attempt = controller.run.attempt
        proof = {
            "fault": f"{NAME}@phase={ambush.phase},step={ambush.step}",
            "attempt": attempt.number if attempt else 0,
            "pid": os.getpid(),
            "victims": [os.getpid()],
            "time": time.time(),
            "did": f"SIGKILL of controller {os.getpid()} of epoch {controller.lock.epoch} in {ambush.phase.upper()}",
        }
        return create_exclusive(self._proof, dump(proof))
