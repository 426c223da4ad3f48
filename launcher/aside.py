"""A backend that never keeps the controller waiting: a thread of its own asks the cluster.

Ray's calls wait while its head is gone, for a minute and longer, and a controller that waits watches nobody. So every
call goes to one thread, in order. The controller waits for an answer for a moment, which is enough while the cluster is
well, and goes on with the last one that it has. Without its head a cluster can start nothing; a gang that runs, and its
recovery on nodes that are there already, need nothing of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launcher.backend import AgentAddress, Backend, NodeInfo
from strategies.errors import ClusterError

ANSWER_S = 0.3  # a cluster that is well answers sooner
FIRST_S = 15.0  # the first answer of a kind is worth waiting for: there is nothing to go on with
PATIENCE_S = 120.0  # for a cluster that has answered before: a head that is started again may take so long
RELEASE_S = 20.0  # less than the minute after which Ray ends a process that has lost its head
CLOSE_S = 5.0


@dataclass(eq=False, slots=True)
class _Call:
    """One call on its way."""

    kind: str
    work: Callable[[], Any]
    since: float
    done: threading.Event = field(default_factory=threading.Event)


class Aside:
    """See :class:`launcher.backend.Backend`; everything but ``release`` returns at once.

    Args:
        backend: The cluster.
        clock: Monotonic seconds.
        answer_s: How long to wait for an answer.
        first_s: How long to wait for the first one.
        patience_s: An error is raised at once if there has been no answer yet, else when there has been none for so
            long.
        release_s: How long ``release`` waits.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        clock: Callable[[], float] = time.monotonic,
        answer_s: float = ANSWER_S,
        first_s: float = FIRST_S,
        patience_s: float = PATIENCE_S,
        release_s: float = RELEASE_S,
    ) -> None:
        self._backend, self._clock = backend, clock
        self._answer_s, self._first_s, self._patience_s = answer_s, first_s, patience_s
        self._release_s = release_s
        self._ill_since: float | None = None  # since when calls have failed, with none that succeeded
        self._calls: deque[_Call] = deque()
        self._more = threading.Condition()
        self._answers: dict[str, Any] = {}
        self._errors: dict[str, Exception] = {}
        self._forgotten: set[str] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="phalanx-cluster", daemon=True)
        self._thread.start()

    # --- the thread -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._calls or self._closed)
                if not self._calls:
                    return
                call = self._calls[0]
            try:
                self._answers[call.kind] = call.work()
                self._errors.pop(call.kind, None)
                self._ill_since = None
            except Exception as error:  # told to whoever asks
                self._errors[call.kind] = error
                self._ill_since = call.since if self._ill_since is None else self._ill_since
            with self._more:
                self._calls.popleft()
            call.done.set()

    def _send(self, kind: str, work: Callable[[], Any], *, once: bool = True) -> _Call:
        """Queue a call; while one of its kind is on its way already, that one will do."""
        if once and kind not in self._answers:
            self._errors.pop(kind, None)
        with self._more:
            known = next((call for call in self._calls if call.kind == kind), None) if once else None
            if known is not None:
                return known
            call = _Call(kind, work, self._clock())
            self._calls.append(call)
            self._more.notify()
        return call

    def _ask(self, kind: str, work: Callable[[], Any]) -> Any:
        """The answer to a call, or the last one of its kind.

        Raises:
            ClusterError: The cluster has said so, or has never answered.
        """
        call = self._send(kind, work)
        if not call.done.wait(max(0.0, call.since + self._answer_s - self._clock())) and kind not in self._answers:
            call.done.wait(self._first_s)
        error = self._errors.get(kind)
        if error is not None and (kind not in self._answers or self.silent_s > self._patience_s):
            raise error
        if kind not in self._answers:
            raise ClusterError(
                "The cluster does not answer.",
                why=f"nothing came back within {self._first_s:.0f} s",
                hint="Check that its head is up (ray status), then: phalanx resume.",
            )
        return self._answers[kind]

    @property
    def silent_s(self) -> float:
        """Seconds for which calls have failed or hung; 0 while the cluster is well."""
        with self._more:
            waiting = [call.since for call in list(self._calls)[:1]]
        since = [*waiting, *([self._ill_since] if self._ill_since is not None else [])]
        return self._clock() - min(since) if since else 0.0

    # --- the backend ----------------------------------------------------------------------------------------------

    def nodes(self) -> list[NodeInfo]:
        """The nodes as last seen."""
        return list(self._ask("nodes", self._backend.nodes))

    def request_agents(self, count: int) -> None:
        """Ask for agents; while an earlier request is on its way, that one will do."""
        self._answers.setdefault("request", None)  # nothing is lost by not knowing it yet
        self._ask("request", lambda: self._backend.request_agents(count))

    def agents(self) -> list[AgentAddress]:
        """The agents as last seen, without those that were forgotten since."""
        found = self._ask("agents", self._backend.agents)
        return [agent for agent in found if agent.incarnation not in self._forgotten]

    def forget(self, agent: AgentAddress) -> None:
        """Free an agent's place, as soon as the cluster listens."""
        self._forgotten.add(agent.incarnation)
        self._send("forget", lambda: self._backend.forget(agent), once=False)

    def why_missing(self) -> str:
        """Why agents are missing: above all, if it is so, that nobody answers."""
        silent_s = self.silent_s
        if silent_s > self._first_s:
            why = next((f" ({error})" for error in self._errors.values()), "")
            return f"the cluster has not answered for {silent_s:.0f} s: its head may be gone{why}"
        self._answers.setdefault("why", "the cluster has not answered yet")
        return str(self._ask("why", self._backend.why_missing))

    def release(self) -> None:
        """Give everything back; waits until the cluster has done so, or is taken for gone with all that was reserved.

        Raises:
            ClusterError: The cluster has refused.
        """
        if not self._send("release", self._backend.release, once=False).done.wait(self._release_s):
            print("warning: the cluster does not answer: what was reserved there was not given back", flush=True)
        error = self._errors.pop("release", None)
        if error is not None:
            raise error

    def close(self) -> None:
        """Drop the connection; a call that hangs is left behind."""
        with self._more:
            self._closed = True
            self._more.notify()
        self._thread.join(CLOSE_S)
        self._backend.close()
