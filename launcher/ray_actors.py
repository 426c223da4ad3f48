"""What runs inside Ray actors, without Ray: the host agent of a node, and the controller of a run.

Both do their work in a thread of their own; the actor's methods only answer questions, so they always answer at once.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.backend import Backend
from launcher.host.agent import AgentOptions, HostAgent
from launcher.lock import ControllerLock
from launcher.ray_client import as_remote
from launcher.run import EventKind
from launcher.store import RunStore
from launcher.supervise import control, withdraw_cancel
from strategies.errors import ClusterError

RETRY_S = 2.0
ANSWER_S = 1.0


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

    def pid(self) -> int:
        """Process id of the agent; also the proof that it came up."""
        return self._agent.address.pid


class ControllerHost:
    """The controller of one run, as the body of an actor that Ray restarts whenever it dies.

    Args:
        run_dir: The run directory.
        connect: Makes the backend; called once the right to control has been won.
        leave: Ends the actor for good; called when the run has ended or another controller has taken over. When the
            cluster fails under it, it dies instead, so that Ray starts it again.
        resume: A person's wish to continue, with an ``id``; obeyed once, however often the actor is restarted.
        adopt: A live gang may be taken over as it is.
    """

    def __init__(
        self,
        run_dir: str,
        connect: Callable[[RunStore], Backend],
        leave: Callable[[], None],
        *,
        resume: Mapping[str, Any] | None = None,
        adopt: bool = True,
    ) -> None:
        self._store = RunStore.open(Path(run_dir))
        self._connect, self._leave = connect, leave
        self._resume, self._adopt = resume, adopt
        self._settled = threading.Event()
        self._error: dict[str, str] = {}
        self._left = False
        threading.Thread(target=self._control, name="phalanx-controller").start()

    def outcome(self, timeout_s: float) -> dict[str, Any] | None:
        """Whether control was won: ``{"epoch": E}``, an error's ``kind, what, why, hint``, or None if not known yet."""
        if not self._settled.wait(timeout_s):
            return None
        return self._error or {"epoch": self._epoch}

    def _control(self) -> None:
        try:
            lock = ControllerLock.acquire(self._store.paths)
            self._epoch = lock.epoch
            backend = self._connect(self._store)
            resume = self._pending_resume()
            if resume is not None:
                withdraw_cancel(self._store)
            self._settled.set()
            control(self._store, backend, lock, resume=resume, adopt=self._adopt or resume is None)
            backend.release()
        except ClusterError as error:
            if self._settled.is_set():
                print(error, flush=True)
                time.sleep(RETRY_S)
                os._exit(1)
            self._error = as_remote(error)
        except Exception as error:  # refused, fenced by a successor, or a bug: this controller is over
            traceback.print_exc()
            self._error = as_remote(error)
        self._settled.set()
        time.sleep(ANSWER_S)  # whoever asks for the outcome must get it
        self._leave()

    def _pending_resume(self) -> Mapping[str, Any] | None:
        """The wish, unless an earlier incarnation of this actor has obeyed it."""
        if self._resume is None:
            return None
        wished = self._resume.get("id")
        obeyed = (event.data.get("id") for event in self._store.events() if event.kind is EventKind.RESUME_REQUESTED)
        return None if wished in obeyed else self._resume
