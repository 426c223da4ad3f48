"""What is committed and does not count: of gangs that the run has gone on without. For people; nobody restores it.

It goes with the next checkpoint that is pruned. No torch, no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.checkpoint.errors import storage_error
from jobs.checkpoint.fence import current, in_order, why_not
from jobs.checkpoint.layout import Token, manifests
from jobs.location import Location, locate


@dataclass(frozen=True, kw_only=True, slots=True)
class Superseded:
    """A record that does not count.

    Attributes:
        step: Step of the state.
        token: (epoch, attempt) of the writers.
        path: The manifest, which was not read.
        reason: Why it does not count, for people.
    """

    step: int
    token: Token
    path: Location
    reason: str


def superseded(root: str | Location) -> list[Superseded]:
    """The records below ``root`` that do not count, the youngest gang's first.

    Raises:
        StorageError: The folder cannot be listed.
    """
    root = locate(root)
    branch = current(root)
    try:
        found = manifests(root)
    except OSError as error:
        raise storage_error("list the checkpoints", root, error) from error
    counting = set(in_order(found, branch))
    left = sorted((one for one in found if one not in counting), key=lambda one: (one.token, one.step), reverse=True)
    return [Superseded(step=one.step, token=one.token, path=one.manifest, reason=why_not(one, branch)) for one in left]
