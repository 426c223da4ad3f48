"""Who is silent for too long, on a clock that runs only while we listen; and whether it is rather us who are cut off.

Time in which this process itself was stopped says nothing about the others. Neither does it say much about each of them
when *nobody* is heard any more: the link that they have in common is ours. Then all of them are waited for, as long as
they would wait for a controller; ranks train on meanwhile, and one cut that heals costs no step. After such a time the
others have as much again to be heard, since TCP tries again the later, the longer it has tried.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

LIMIT = 0.8
"""Of ``detect_s``: the rest is for the last beat before the silence, and for the decision."""
MISSED = 2
"""Beats that nobody has sent, and one silent for too long beside: it is not that one who is cut off."""


class Peer(Protocol):
    """Somebody who beats once the handshake is done (``up``)."""

    up: bool


P = TypeVar("P", bound=Peer)


class Silence(Generic[P]):
    """How long each peer has been silent. A look costs what has become of it, not what there are of peers.

    Args:
        detect_s: A peer that is silent for :data:`LIMIT` of it is silent for too long.
        beat_s: How often peers beat; a longer gap between two looks is our own.
        patience_s: How long all are waited for when nobody is heard.
        now: Monotonic seconds.

    Attributes:
        cut_off: Two or more are up and nobody is heard: all are waited for.
    """

    def __init__(self, *, detect_s: float, beat_s: float, patience_s: float, now: float) -> None:
        self.cut_off = False
        self._limit_s, self._beat_s, self._patience_s = LIMIT * detect_s, beat_s, patience_s
        self._at = now
        self._listened_s = 0.0
        self._excused_s = 0.0  # up to this time of listening nobody is silent
        self._waited_s = 0.0  # for all of them
        self._heard_s: OrderedDict[P, float] = OrderedDict()  # the one that is silent for longest first

    @property
    def in_doubt(self) -> bool:
        """Silence says nothing: nobody is heard, or somebody is again and the others may follow later."""
        return self.cut_off or self._listened_s < self._excused_s

    def add(self, peer: P) -> None:
        """Listen to one more from now on."""
        self._heard_s[peer] = max(self._listened_s, self._excused_s)

    def remove(self, peer: P) -> None:
        """One that is not listened to any more."""
        self._heard_s.pop(peer, None)

    def clear(self) -> None:
        """Nobody is."""
        self._heard_s.clear()

    def heard(self, peer: P) -> None:
        """A sign of life."""
        if self.cut_off:
            self.cut_off = False
            self._excused_s = self._listened_s + self._waited_s
            self._heard_s = OrderedDict.fromkeys(self._heard_s, self._excused_s)
        self._waited_s = 0.0
        self._heard_s[peer] = max(self._listened_s, self._excused_s)
        self._heard_s.move_to_end(peer)

    def silent_s(self, peer: P) -> float:
        """Seconds of listening in which nothing was heard of it."""
        return self._listened_s - self._heard_s[peer]

    def late(self, now: float) -> list[P]:
        """Look: those that are silent for too long; nobody while all are waited for."""
        gap_s, self._at = min(now - self._at, self._beat_s), now
        if self.cut_off:
            self._waited_s += gap_s
            self.cut_off = self._waited_s < self._patience_s and len(self._up(2)) == 2
            return []
        self._listened_s += gap_s
        late = list(itertools.takewhile(lambda peer: self.silent_s(peer) > self._limit_s, self._heard_s))
        if self._patience_s and not self._waited_s and any(peer.up for peer in late) and self._nobody_is_heard():
            self.cut_off = True
            return []
        return late

    def _nobody_is_heard(self) -> bool:
        newest = self._up(2)
        return len(newest) == 2 and self.silent_s(newest[0]) > MISSED * self._beat_s

    def _up(self, most: int) -> list[P]:
        """Those that were heard last, of the ones whose handshake is done."""
        return list(itertools.islice((peer for peer in reversed(self._heard_s) if peer.up), most))
