"""What becomes of a checkpoint that cannot be written. Standard library only.

Training does not stop for it: every step is in memory as before, and the next checkpoint that is due is another try.
Only the last one of a run has to be written: it is tried again until the store takes it or patience is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

FIRST_S = 2.0
LONGEST_S = 60.0
SIGN_OF_LIFE_S = 2.0  # a rank that waits says so as often


def waits(patience_s: float, now: Callable[[], float] = time.monotonic) -> Iterator[float]:
    """Seconds to wait before each further try, twice as long each time, until patience is over."""
    end, wait_s = now() + patience_s, FIRST_S
    while (left := end - now()) > 0:
        yield min(wait_s, left)
        wait_s = min(LONGEST_S, 2 * wait_s)


def passing(failure: dict[str, Any]) -> bool:
    """Whether a failure to write may be over at the next try; to be fenced off, say, never is."""
    return failure.get("kind") == "storage"


def stalled_s(pending: dict[str, Any]) -> float:
    """Seconds that a checkpoint has cost; of one that is waited for and tried again, since this was asked last.

    Args:
        pending: What is known of it: ``stall_s`` of the call that made it, ``waited_s`` of the step after that, and
            ``since`` when it is waited for (:func:`time.perf_counter`).
    """
    if "since" not in pending:
        return float(pending["stall_s"] + pending.get("waited_s", 0.0))
    since, pending["since"] = pending["since"], time.perf_counter()
    return float(pending["since"] - since)


def words(failure: dict[str, Any]) -> str:
    """What went wrong, in a line."""
    why = failure.get("why", "")
    return str(failure["what"]) + (f" ({why})" if why else "")
