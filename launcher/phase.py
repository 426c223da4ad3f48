"""The phases of a controller; what leads from one to the other is drawn in :mod:`launcher.controller`."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """What the controller is busy with."""

    GATHER = "gather"
    RUN = "run"
    STOP = "stop"
    BACKOFF = "backoff"
    END = "end"
