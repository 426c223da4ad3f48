"""What runs inside Ray actors, without Ray: the host agent of a node, and the controller of a run.

Both do their work in a thread of their own; the actor's methods only answer questions, so they always answer at once.

===============  ===============================================  ===================================================
signal           to the process of a controller's actor           to the process of an agent's actor
===============  ===============================================  ===================================================
SIGTERM, SIGINT  it dies at once; Ray starts it again, and the    a notice that the node will be taken away: all ranks
                 gang is adopted with no step lost                save and leave within ``recovery.preempt_grace_s``,
                                                                  then the agent; a spare takes the node's place
SIGKILL          likewise                                         the node counts as lost, a spare takes its place
===============  ===============================================  ===================================================

Neither of them ends a run: that is what ``phalanx cancel`` is for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher import ray_order
from launcher.backend import Backend
from launcher.host.agent import AgentOptions, HostAgent
from launcher.lock import ControllerLock, newest_epoch
from launcher.logbook import Fenced
from launcher.proposal import accept
from launcher.ray_client import as_remote
from launcher.run import EventKind
from launcher.store import RunStore, write_atomic
from launcher.supervise import control
from strategies.errors import ClusterError, ResumeRefused, StorageError

RETRY_S = 2.0  # doubled each time that it has led nowhere
RETRY_MAX_S = 60.0
FRUITLESS_LIMIT = 12  # controllers of one run that came to nothing, one after the other
REFUSED_PATIENCE_S = 60.0  # for another controller to leave, when this one is not the first of its actor
STORAGE_PATIENCE_S = 1800.0  # for a run directory that cannot be written
ANSWER_S = 1.0


def on_termination(action: Callable[[str], None]) -> None:
    """Call ``action`` with the name of the signal instead of what Ray does on SIGTERM and SIGINT.

    Ray would leave in good order, which it takes for the wish that the actor be gone for good. To be called in the
    main thread, which is where Ray runs the constructor of an actor.
    """
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        signal.signal(number, lambda received, frame: action(signal.Signals(received).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # Ray starts its workers with SIGINT blocked


def die(reason: str) -> None:
    """End this process at once, so that Ray starts its actor again, here or on another node."""
    print(f"the controller dies: {reason}", flush=True)
    os._exit(1)


class AgentHost:
    """The host agent of one node, as the body of an actor.

    Args:
        run_dir: The run directory.
        node: The node's identity.
        bind: The node's address in the cluster.
        slots: Devices that ranks may use here.
        options: Fields of :class:`launcher.host.agent.AgentOptions`.
        leave: Ends the actor; called when the agent has ended.
    """

    def __init__(
        self, run_dir: str, node: str, bind: str, slots: int, options: Mapping[str, Any], leave: Callable[[], None]
    ) -> None:
        self._agent = HostAgent(run_dir=run_dir, node=node, bind=bind, slots=slots, options=AgentOptions(**options))
        self._leave = leave
        threading.Thread(target=self._serve, name="phalanx-agent").start()

    def _serve(self) -> None:
        try:
            print(f"agent of {self._agent.address.node} ended: {self._agent.serve()}", flush=True)
        except Exception:
            traceback.print_exc()
        finally:
            self._leave()

    def stop(self, reason: str) -> None:
        """Ask the agent to end its ranks and itself; the actor ends with it."""
        self._agent.stop(reason)

    def notice(self, reason: str) -> None:
        """The node will be taken away; see :meth:`launcher.host.agent.HostAgent.notice`."""
        self._agent.notice(reason)

    def pid(self) -> int:
        """Process id of the agent; also the proof that it came up."""
        return self._agent.address.pid


class ControllerHost:
    """The controller of one run, as the body of an actor that Ray restarts whenever it dies.

    Args:
        run_dir: The run directory.
        connect: Makes the backend; called once the right to control has been won.
        leave: Ends the actor for good; called when the run has ended, when another controller has taken over, or when
            going on is of no use. When cluster or storage fail under it, it dies instead.
        order: Name of the order (:mod:`launcher.ray_order`) that the actor obeys.
        resume: A person's wish to continue, with an ``id``; obeyed once, however often the actor is restarted.
        adopt: A live gang may be taken over as it is.
        die: Ends the process so that Ray starts the actor again.
        sleep: Lets time pass.
    """

    def __init__(
        self,
        run_dir: str,
        connect: Callable[[RunStore], Backend],
        leave: Callable[[], None],
        *,
        order: str,
        resume: Mapping[str, Any] | None = None,
        adopt: bool = True,
        die: Callable[[str], None] = die,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = RunStore.open(Path(run_dir))
        self._connect, self._leave, self._die, self._sleep = connect, leave, die, sleep
        self._order, self._resume, self._adopt = order, resume, adopt
        self._settled = threading.Event()
        self._error: dict[str, str] = {}
        self._lock: ControllerLock | None = None
        self._backend: Backend | None = None
        self._taken = self._ruled = False  # the order is ours; an incarnation of this actor has begun to control
        threading.Thread(target=self._control, name="phalanx-controller").start()

    def outcome(self, timeout_s: float) -> dict[str, Any] | None:
        """Whether control was won: ``{"epoch": E}``, an error's ``kind, what, why, hint``, or None if not known yet."""
        if not self._settled.wait(timeout_s):
            return None
        return self._error or {"epoch": self._lock.epoch if self._lock else 0}

    def _control(self) -> None:
        try:
            self._rule()
        except Fenced:
            print("another controller has taken over", flush=True)
        except ResumeRefused as error:  # nothing is ours
            self._error = as_remote(error)
        except Exception as error:
            traceback.print_exc()
            self._error = as_remote(error)
            passing = isinstance(error, ClusterError | StorageError | OSError)
            if passing and self._ruled and self._worth_another_try():
                self._die(str(error))
                return
            if self._taken:
                self._give_up(error)
        self._settled.set()
        time.sleep(ANSWER_S)  # whoever asks for the outcome must get it
        self._leave()

    def _rule(self) -> None:
        self._taken = self._ruled = ray_order.fate(self._store.paths, self._order) is ray_order.Fate.TAKEN
        lock = self._lock = self._win(REFUSED_PATIENCE_S if self._ruled else 0.0)
        resume = self._pending_resume()
        if not ray_order.take(self._store.paths, self._order):
            self._decline(lock)
            return
        self._taken = True
        wish = accept(self._store, resume)
        backend = self._backend = self._connect(self._store)
        self._ruled = True
        self._settled.set()
        control(self._store, backend, lock, resume=wish, adopt=self._adopt or wish is None)
        backend.release()

    def _win(self, patience_s: float) -> ControllerLock:
        """The right to control. A predecessor in the same actor has died, but somebody else may hold the run."""
        waited = 0.0
        while True:
            try:
                return ControllerLock.acquire(self._store.paths)
            except ResumeRefused:
                if waited >= patience_s or self._store.run().state.terminal:
                    raise
            self._sleep(RETRY_S)
            waited += RETRY_S

    def _decline(self, lock: ControllerLock) -> None:
        """The client has given up on us: it has been told that nothing came of it, so nothing may."""
        error = ClusterError("The controller came too late: the client had given up.")
        run = self._store.run()
        if not run.state.terminal and not run.attempts:
            self._store.append(EventKind.RUN_FAILED, epoch=lock.epoch, reason=error.what)
        lock.release()
        self._error = as_remote(error)

    def _pending_resume(self) -> Mapping[str, Any] | None:
        """The wish, unless an earlier incarnation of this actor has obeyed it."""
        if self._resume is None:
            return None
        obeying = (EventKind.RESUME_REQUESTED, EventKind.CONTROLLER_STARTED)
        obeyed = {event.data.get("id") for event in self._store.events() if event.kind in obeying}
        return None if self._resume.get("id") in obeyed else self._resume

    # --- when something fails -------------------------------------------------------------------------------------

    def _worth_another_try(self) -> bool:
        """Let some time pass; false when the last controllers have all come to nothing, or nothing can be written."""
        fruitless = self._fruitless()
        if fruitless >= FRUITLESS_LIMIT:
            return False
        self._sleep(min(RETRY_MAX_S, RETRY_S * 2**fruitless))
        waited = pause = 0.0
        while not _writable(self._store.paths):
            if waited > STORAGE_PATIENCE_S:
                return False
            pause = min(RETRY_MAX_S, max(RETRY_S, 2 * pause))
            self._sleep(pause)
            waited += pause
        return True

    def _fruitless(self) -> int:
        """Controllers that have come one after the other and recorded nothing but their coming."""
        last, now = 0, newest_epoch(self._store.paths)
        with contextlib.suppress(StorageError, OSError):
            fruits = (event.epoch for event in self._store.events() if event.kind is not EventKind.CONTROLLER_STARTED)
            last = max(fruits, default=0)
        return max(0, now - last)

    def _give_up(self, error: BaseException) -> None:
        """Record the end, and leave no reservation behind."""
        if self._lock is not None and self._lock.lost():
            return
        with contextlib.suppress(Exception):
            if self._lock is not None and not self._store.run().state.terminal:
                reason = f"the controller failed: {as_remote(error)['what']}"
                self._store.append(EventKind.RUN_FAILED, epoch=self._lock.epoch, reason=reason)
        with contextlib.suppress(Exception):
            (self._backend or self._connect(self._store)).release()
        with contextlib.suppress(Exception):
            if self._lock is not None:
                self._lock.release()


def _writable(paths: RunPaths) -> bool:
    probe = paths.control / f".probe-{os.getpid()}"
    try:
        write_atomic(probe, b"x" * 4096)
        probe.unlink()
    except (StorageError, OSError):
        return False
    return True
