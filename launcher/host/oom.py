"""Whether a rank that was killed may have been killed by the kernel, for want of memory.

Nobody tells: a process that the kernel kills dies of SIGKILL, as of anybody's. But the kernel counts its victims, per
group of processes (:mod:`jobs.cgroup`). Which process it was it does not say, so what is said here is that there was
such a victim in the rank's group, and when; a rank that died of SIGKILL soon after is taken for it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jobs import cgroup
from jobs.cgroup import MemoryGroup

RECENT_S = 60.0
"""How long a process may take from its killing to its end, which frees its memory and its devices."""

_SHELL = 128  # a shell ends with this and the number of the signal that has ended its command


@dataclass(slots=True)
class _Tally:
    """The victims of one group: when the count was seen to grow, and to how many."""

    group: MemoryGroup | None
    seen: list[tuple[float, int]] = field(default_factory=list)

    @property
    def now(self) -> int:
        """How many there are."""
        return self.seen[-1][1] if self.seen else 0

    def before(self, moment: float) -> int:
        """How many there were at a moment; 0 if nobody had looked by then."""
        return next((count for at, count in reversed(self.seen) if at <= moment), 0)


class VictimWatch:
    """Follows the counts of the groups that the ranks of this node are in.

    Args:
        proc: Where the kernel's files of processes are.
        clock: Monotonic seconds.
    """

    def __init__(self, proc: Path = cgroup.PROC, clock: Callable[[], float] = time.monotonic) -> None:
        self._proc = proc
        self._clock = clock
        self._tallies: dict[Path | None, _Tally] = {}
        self._ranks: dict[int, tuple[Path | None, int]] = {}  # whose group, and its victims when the rank began

    def begin(self, pid: int) -> None:
        """A rank runs: what happens to its group from now on is of interest."""
        group = cgroup.memory_group(pid, self._proc)
        if group is not None and group.oom_kills() is None:
            group = None  # then what the whole machine says is the best there is
        key = group.folder if group is not None else None
        tally = self._tallies.setdefault(key, _Tally(group))
        self._look(tally)
        self._ranks[pid] = (key, tally.now)

    def look(self) -> None:
        """See what has happened; to be called every few seconds, or an old death is taken for a recent one."""
        for tally in self._tallies.values():
            self._look(tally)

    def _look(self, tally: _Tally) -> None:
        group = tally.group
        count = group.oom_kills() if group is not None else cgroup.oom_kills_of_machine(self._proc)
        if count is not None and (not tally.seen or tally.seen[-1][1] != count):
            tally.seen.append((self._clock(), count))
            del tally.seen[:-64]

    def verdict(self, pid: int, code: int | None, signum: int | None) -> str:
        """What speaks for it that a rank, which nobody of ours has killed, was killed by the kernel; "" if nothing.

        Args:
            pid: Its process id.
            code: Its exit code, if it has one.
            signum: The signal that has ended it, if one has.
        """
        known = self._ranks.pop(pid, None)
        if known is None or signal.SIGKILL not in (signum, (code or 0) - _SHELL):
            return ""
        key, earlier = known
        tally = self._tallies[key]
        self._look(tally)
        victims = tally.now - max(earlier, tally.before(self._clock() - RECENT_S))
        return _sentence(victims, tally.group) if victims > 0 else ""


def _sentence(victims: int, group: MemoryGroup | None) -> str:
    whom = f"{victims} process{'es' if victims > 1 else ''}"
    if group is None:
        return f"the kernel had just killed {whom} of the machine for want of memory"
    limit = group.limit_bytes()
    room = f", which may use {limit / 1e9:.2f} GB," if limit is not None else ""
    return f"the kernel had just killed {whom} of the cgroup {group.name}{room} for want of memory"
