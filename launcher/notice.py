"""What a gang does when a node of it will be taken away at a known time. Pure.

All ranks must leave after the same step, so it must be one whose end none of them has come to when the word of it
comes; and what they save must be safe before the node goes. If that fits, nothing is lost. Else the gang goes on for as
long as another step will be done *and kept*, and is then ended for other nodes at once: what it would do after that is
lost in any case, and the sooner the others begin, the better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

DELIVERY_S = 1.0  # in which an order comes to every rank; a rank that it comes to too late is found by the deadline
STEPS_AHEAD = 2  # with time to spare: what the controller knows is at most one step old, and one is under way
EARLY = 0.9  # a step may end so much sooner than most do
EXIT_S = 1.0  # from the commit of a checkpoint to the end of the ranks
COPY_S = 3.0  # from the end of a step to a replica of it in memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Present:
    """Where the gang is.

    Attributes:
        last: Highest step that a rank has completed.
        elapsed_s: Since every rank had; 0 while not all have, and beside training.
        typical_s: Seconds of a step, the median; 0 while too few were seen.
        most_s: Seconds of a step, 99 times of 100; 0 while nothing is known.
        save_s: Seconds from the end of a step to the commit of its checkpoint, the longest; 0 while none was seen.
    """

    last: int
    elapsed_s: float
    typical_s: float
    most_s: float
    save_s: float

    def ends_s(self, step: int) -> float:
        """Seconds until a later step is complete, at most."""
        return max(0.0, self.most_s - self.elapsed_s) + (step - self.last - 1) * self.most_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Which steps survive the end of their ranks.

    Attributes:
        steps: Of the whole run.
        newest: The newest step that is on disk, or that the attempt has begun with.
        disk_every: Steps between checkpoints on disk; 0 for none.
        memory_every: Steps between copies in memory; 0 for none.
    """

    steps: int
    newest: int
    disk_every: int = 0
    memory_every: int = 0

    def in_memory(self, step: int) -> bool:
        """Whether there is a copy of it in memory."""
        return bool(self.memory_every) and step % self.memory_every == 0

    def on_disk(self, step: int) -> bool:
        """Whether a checkpoint of it is due."""
        return step == self.steps or bool(self.disk_every and step % self.disk_every == 0)

    def newest_of(self, last: int) -> int:
        """The newest step up to ``last`` from which others can go on."""
        copied = last - last % self.memory_every if self.memory_every else 0
        return max(copied, min(self.newest, last))

    def next_after(self, last: int) -> int:
        """The first step after ``last`` that is kept."""
        due = [last + every - last % every for every in (self.disk_every, self.memory_every) if every]
        return min([self.steps, *due])


class Course(Enum):
    """What to do."""

    LEAVE = "leave"  # after a step, with a checkpoint
    FINISH = "finish"  # the run is done in time
    GO_ON = "go on"  # until a step is kept
    SWAP = "swap"  # at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What to do, and what becomes of it.

    Attributes:
        course: What.
        step: The step that is waited for, or the newest that is done.
        within_s: Seconds until that is done and kept, at most; 0 while nothing is known.
        words: Why, and what is lost, for people.
    """

    course: Course
    step: int
    within_s: float = 0.0
    words: str = ""


def choose(at: Present, kept: Kept, left_s: float, agreed: int = 0) -> Answer:
    """What the gang does.

    Args:
        at: Where it is.
        kept: What survives.
        left_s: Seconds until the node is gone.
        agreed: A later step after which the ranks leave already, for another reason; 0 for none.
    """
    for after in [agreed] if agreed else _agreeable(at):
        step = min(after, kept.steps)
        within_s = at.ends_s(step) + at.save_s + EXIT_S
        if within_s <= left_s or not at.most_s:
            done = after >= kept.steps
            return Answer(course=Course.FINISH, step=step) if done else _leave(at, after, within_s, left_s)
    upcoming = kept.next_after(at.last)
    within_s = at.ends_s(upcoming) + (COPY_S if kept.in_memory(upcoming) else at.save_s + EXIT_S)
    if within_s <= left_s:
        return _go_on(at, upcoming, within_s, left_s)
    if _is_being_kept(at, kept) and left_s > EXIT_S:
        return Answer(course=Course.GO_ON, step=at.last)
    return _swap(at, kept, left_s)


def unhurried(at: Present, delivery_s: float) -> int:
    """A step after which ranks can leave that nothing urges; 0 while it is not known how long steps take.

    Args:
        at: Where the gang is.
        delivery_s: In which an order comes to every rank whose node is there at all.
    """
    if not at.typical_s:
        return 0
    return at.last + STEPS_AHEAD + math.ceil(delivery_s / (EARLY * at.typical_s))


def _is_being_kept(at: Present, kept: Kept) -> bool:
    """The newest step is on its way to where it is safe."""
    if kept.in_memory(at.last):
        return at.elapsed_s < COPY_S
    return kept.on_disk(at.last) and kept.newest < at.last


def _agreeable(at: Present) -> list[int]:
    """Steps of which no rank has come to the end when an order comes; those with more room for an error first."""
    if not at.typical_s:
        return [at.last + STEPS_AHEAD]
    first = at.last + 1 + math.floor((at.elapsed_s + DELIVERY_S) / (EARLY * at.typical_s))
    safe = at.last + STEPS_AHEAD + math.ceil(DELIVERY_S / at.typical_s)
    return list(range(max(first, safe), first - 1, -1))


def _leave(at: Present, after: int, within_s: float, left_s: float) -> Answer:
    words = f"all ranks save and leave after step {after}"
    if not at.most_s:
        return Answer(course=Course.LEAVE, step=after, words=f"{words}; how long that takes is not known yet")
    unless = "" if at.save_s else " if the checkpoint takes no longer than the rest (none was made yet)"
    words += f", within {within_s:.1f} s of the {left_s:.1f} s that are left; nothing is lost{unless}"
    return Answer(course=Course.LEAVE, step=after, within_s=within_s, words=words)


def _go_on(at: Present, step: int, within_s: float, left_s: float) -> Answer:
    words = f"{_too_late(at, left_s)}: the ranks go on until step {step} is kept, within {within_s:.1f} s, and end then"
    return Answer(course=Course.GO_ON, step=step, within_s=within_s, words=words)


def _swap(at: Present, kept: Kept, left_s: float) -> Answer:
    back = kept.newest_of(at.last)
    lost = [] if back == at.last else [f"step {at.last}" if back == at.last - 1 else f"steps {back + 1} to {at.last}"]
    lost += [f"{at.elapsed_s:.1f} s of step {at.last + 1}"]
    unsure = back == at.last and _is_being_kept(at, kept)
    doubt = f", and step {back} if its copy in memory is not whole yet" if unsure else ""
    words = f"{_too_late(at, left_s)}: the ranks end now, and others go on after step {back}"
    words += f"; lost: {', '.join(lost)}{doubt}"
    return Answer(course=Course.SWAP, step=at.last, words=words)


def _too_late(at: Present, left_s: float) -> str:
    takes = f"a step takes {at.most_s:.1f} s" + (f" and a checkpoint {at.save_s:.1f} s" if at.save_s else "")
    return f"no step can be agreed on and saved in the {left_s:.1f} s that are left ({takes})"
