"""The end of ranks: SIGTERM, after a grace SIGKILL, and then patience.

A process that tears down a device, or waits in the kernel for a mount that is stuck, takes its time to die. Nothing
makes it faster, so nobody waits for it here and nothing that is healthy is ended because of it: the controller is told
what is waited for. Only a pool that does not answer is ended by force, and its ranks directly.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.host import process
from launcher.host.pool_link import PoolLink

FORCE_AFTER_S = 5.0  # a pool that has not answered for so long will not
TELL_AFTER_S = 2.0  # an end that takes longer is worth a word ...
TELL_EVERY_S = 5.0  # ... and another one when what is waited for has changed
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Target:
    """A rank that is to end.

    Attributes:
        rank: Global rank.
        key: How the pool knows it.
        pid: Its process; 0 while it has none.
        born: When that was started, see :func:`launcher.host.process.birth`.
    """

    rank: int
    key: str
    pid: int
    born: int

    @property
    def is_there(self) -> bool:
        """Its process has not ended."""
        return bool(self.pid) and not process.has_ended(self.pid, self.born)


class Killing:
    """Ends the ranks of one attempt after the other.

    Args:
        living: The ranks that have not ended.
        tell: Called with what is waited for: rows of ``rank`` (-1: none), ``pid`` and ``state``, and for how long.
    """

    def __init__(self, living: Callable[[], list[Target]], tell: Callable[[list[dict[str, Any]], float], None]) -> None:
        self._living = living
        self._tell = tell
        self._kill_at: float | None = None
        self._since: float | None = None  # SIGKILL was sent
        self._look_at = 0.0
        self._told: list[dict[str, Any]] = []
        self._told_at = 0.0

    @property
    def due(self) -> float | None:
        """When :meth:`tick` has something to do (monotonic seconds)."""
        waits = (self._kill_at, self._look_at if self._since is not None else None)
        return min((at for at in waits if at is not None), default=None)

    def begin(self, pool: PoolLink | None, grace_s: float, now: float) -> None:
        """Begin, or hurry: who asks again is told again."""
        deadline = now + max(0.0, grace_s)
        self._kill_at = deadline if self._kill_at is None else min(deadline, self._kill_at)
        self._told = []
        if grace_s > 0:
            self.send(pool, signal.SIGTERM)
        self.tick(pool, now)

    def end(self) -> None:
        """No rank is left."""
        self._kill_at = self._since = None
        self._told = []

    def send(self, pool: PoolLink | None, signum: int) -> None:
        """A signal to every rank and its process group."""
        for target in self._living():
            if pool is not None and target.pid:
                pool.kill(target.key, signum)

    def tick(self, pool: PoolLink | None, now: float) -> None:
        """Go on."""
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at, self._look_at = None, now
            self._since = now if self._since is None else self._since
            self.send(pool, signal.SIGKILL)
        if self._since is None or pool is None or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        pool.ask(now)
        stuck = pool.owes_s(now) >= FORCE_AFTER_S
        if stuck:
            self._force(pool)
        if now - self._since >= TELL_AFTER_S:
            self._report(pool, now, stuck=stuck)

    def _force(self, pool: PoolLink) -> None:
        """The kernel ends the ranks with their pool, unless the pool cannot die either."""
        pool.force()
        for target in self._living():
            if target.is_there and not process.send_group(target.pid, signal.SIGKILL):
                process.send(target.pid, signal.SIGKILL)

    def _report(self, pool: PoolLink, now: float, *, stuck: bool) -> None:
        assert self._since is not None
        there = {target.pid: target.rank for target in self._living() if target.is_there}
        others = [*pool.left, *([pool.pid] if stuck else [])]
        found = there | {pid: -1 for pid in others if pid not in there}
        rows = [{"rank": rank, "pid": pid, "state": process.standing(pid)} for pid, rank in found.items()]
        if not rows or rows == self._told or (self._told and now - self._told_at < TELL_EVERY_S):
            return
        self._told, self._told_at = rows, now
        self._tell(rows, now - self._since)
