"""Signals that ask a command to end."""

from __future__ import annotations

import signal


def heard() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM and SIGHUP; not SIGHUP where it is ignored, which is what ``nohup`` is for.

    SIGINT is heard in any case: a shell starts what it puts into the background with that signal ignored.
    """
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)
