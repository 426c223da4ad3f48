"""What becomes of a checkpoint that cannot be written, or not in time. Standard library only.

Training does not stop for it: every step is in memory as before, and the next checkpoint that is due is another try.
One that is due while the one before is still being written is left out. Only the last one of a run has to be written:
it is tried again until the store takes it or patience is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.location import Location

LATE_S = 10.0
"""So long a checkpoint that is due waits for the one before (a choice)."""
FIRST_S = 2.0
LONGEST_S = 60.0
SIGN_OF_LIFE_S = 2.0  # a rank that waits says so as often

Failure = dict[str, Any]
"""``kind``, ``what``, ``why`` and ``hint`` of an error, as :func:`jobs.checkpoint.gang.revive` takes it."""


@dataclass(kw_only=True, slots=True)
class Underway:
    """A checkpoint on its way to the disk, as one rank sees it.

    Attributes:
        step: Its step.
        manifest: Where it will be.
        record: What goes beside the tensors.
        began: When its step began to stand still for it (seconds of the performance counter).
        stall_s: For how long it did.
        waited_s: How long the step after it waited for the copy of it; None while that is not over.
        outcome: What the persister has said; known to rank 0 alone, before all agree.
        late: One that was due after it has been left out.
    """

    step: int
    manifest: Location
    record: Mapping[str, Any]
    began: float
    stall_s: float = 0.0
    waited_s: float | None = None
    outcome: Mapping[str, Any] | None = None
    late: bool = False

    @property
    def failure(self) -> Failure | None:
        """Why it could not be written, as far as that is known."""
        return dict(self.outcome["error"]) if self.outcome is not None and "error" in self.outcome else None


def waits(patience_s: float, now: Callable[[], float] = time.monotonic) -> Iterator[float]:
    """Seconds to wait before each further try, twice as long each time, until patience is over."""
    end, wait_s = now() + patience_s, FIRST_S
    while (left := end - now()) > 0:
        yield min(wait_s, left)
        wait_s = min(LONGEST_S, 2 * wait_s)


def passing(failure: Failure) -> bool:
    """Whether a failure to write may be over at the next try; to be fenced off, say, never is."""
    return failure.get("kind") == "storage"


def words(failure: Failure) -> str:
    """What went wrong, in a line."""
    why = failure.get("why", "")
    return str(failure["what"]) + (f" ({why})" if why else "")
