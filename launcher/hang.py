"""Who holds the gang up? Judged from where every rank stands. Pure.

In synchronous training one rank that stands still makes all others wait in a collective, so nearly every stack shows a
rank that waits, and the culprit is the one that does not, or that waits for something else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

_FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+|\?\?\?) in (?P<function>.+)')
_COMMUNICATION = re.compile(r"torch/distributed/|deepspeed/comm/|deepspeed/runtime/pipe/p2p|/multiprocessing/")
_STORAGE = re.compile(r"jobs/(checkpoint/|sample\.py)")
_INNERMOST = 8  # a collective is entered a few frames above the wait


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where one rank stands.

    Attributes:
        step: Last step that it has completed.
        state: The kernel's letter for its process (R, S, D, T, ...); "" when it is gone.
        stack: Frames, innermost first, one per line as faulthandler writes them; "" when it did not answer.
    """

    step: int
    state: str = ""
    stack: str = ""

    @property
    def frames(self) -> tuple[tuple[str, str], ...]:
        """(file, function) of every frame, innermost first."""
        return tuple((m["file"], m["function"]) for m in map(_FRAME.match, self.stack.splitlines()) if m)

    @property
    def communicates(self) -> bool:
        """It waits in a collective or a transfer."""
        return any(_COMMUNICATION.search(file) for file, _ in self.frames[:_INNERMOST])

    @property
    def stores(self) -> bool:
        """It writes or reads a checkpoint, on its own and not waiting for anybody."""
        return not self.communicates and any(_STORAGE.search(file) for file, _ in self.frames)


def culprit(standings: Mapping[int, Standing]) -> tuple[int, str]:
    """The rank that the others wait for, and why it is the one.

    Returns:
        (-1, why) when the evidence points at nobody.
    """
    for judge in (_stopped, _silent, _busy, _behind, _elsewhere):
        found = judge(standings)
        if found is not None:
            return found
    return -1, "all ranks wait in the same kind of communication: a link or a device, not a process, is stuck"


def _stopped(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    words = {"T": "is stopped by a signal", "t": "is held by a debugger", "D": "is stuck in the kernel (disk, driver)"}
    words |= {"Z": "is dead but not reaped", "": "has no process any more"}
    for rank, at in sorted(standings.items()):
        if at.state in words:
            return rank, words[at.state]
    return None


def _silent(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    silent = [rank for rank, at in sorted(standings.items()) if not at.stack]
    if silent and len(silent) < len(standings):
        return silent[0], "does not say where it stands, and the others do"
    return None


def _busy(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    """One that does not communicate while others wait."""
    busy = [rank for rank, at in sorted(standings.items()) if at.stack and not at.communicates]
    if not busy or len(busy) == len(standings):
        return None
    rank = min(busy, key=lambda one: (standings[one].step, one))
    return (
        rank,
        f"does not communicate while {len(standings) - len(busy)} other ranks wait: it is in {_top(standings[rank])}",
    )


def _behind(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    lowest = min(at.step for at in standings.values())
    behind = [rank for rank, at in sorted(standings.items()) if at.step == lowest]
    if len(behind) * 2 < len(standings):
        return behind[0], f"has completed step {lowest} only, others more"
    return None


def _elsewhere(standings: Mapping[int, Standing]) -> tuple[int, str] | None:
    """One whose stack leaves the others' at the outermost place at which they part."""
    stacks = {rank: _from_the_loop(at) for rank, at in sorted(standings.items()) if at.frames}
    for depth in range(max((len(frames) for frames in stacks.values()), default=0)):
        at = {rank: frames[depth] if depth < len(frames) else ("", "") for rank, frames in stacks.items()}
        common, count = Counter(at.values()).most_common(1)[0]
        if count == len(stacks):
            continue
        odd = [rank for rank, frame in at.items() if frame != common]
        if len(odd) * 2 < len(stacks):
            there, here = common[1] or "the end", at[odd[0]][1] or "the end"
            return odd[0], f"waits in another place than the others: in {here}, and they are in {there}"
        return None
    return None


def _from_the_loop(at: Standing) -> tuple[tuple[str, str], ...]:
    """Frames from the worker's own inwards, outermost first; what started the process differs among ranks."""
    frames = tuple(reversed(at.frames))
    start = next((i for i, (file, _) in enumerate(frames) if file.endswith("jobs/worker.py")), 0)
    return frames[start:]


def _top(at: Standing) -> str:
    file, function = at.frames[0] if at.frames else ("", "an unknown place")
    return f"{function} ({file.rsplit('/', 1)[-1]})" if file else function
