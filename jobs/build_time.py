"""How long a rank took to build its engine, by part. Imports torch.

===================  ==================================================================================================
``device_s``         taking the device: its context is made, by a first allocation that is waited for
``communicators_s``  meeting the other ranks: the rendezvous, the process groups and, where a group is connected by its
                     first collective only (NCCL), that one of each group. What is first used after the engine is built
                     is connected then: between stages, in the first step. In it is the wait for ranks that come later,
                     so the rank that came last says best what it takes
``engine_s``         all the rest, from the start of building until the engine is there
===================  ==================================================================================================
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch.distributed as dist

from jobs.own_time import FUNCTIONS

_GROUPS = ("new_group", "new_subgroups_by_enumeration")


class BuildTime:
    """Clock of one rank, from now on until :meth:`end`.

    Args:
        clock: Seconds of the host, never set back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()
        self._device_s = self._communicators_s = 0.0
        self._meeting = False

    @contextlib.contextmanager
    def taking_device(self) -> Iterator[None]:
        """What passes meanwhile is ``device_s``."""
        began = self._clock()
        try:
            yield
        finally:
            self._device_s += self._clock() - began

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """What passes meanwhile is ``communicators_s``, once where one meeting is part of another."""
        if self._meeting:
            yield
            return
        self._meeting, began = True, self._clock()
        try:
            yield
        finally:
            self._meeting = False
            self._communicators_s += self._clock() - began

    @contextlib.contextmanager
    def watching(self, *, lazy: bool) -> Iterator[None]:
        """Whoever makes a process group meanwhile, by :mod:`torch.distributed`, is seen.

        Args:
            lazy: The first collective of a group connects it, so that is seen, too.
        """
        used: set[str] = set()
        before = {name: getattr(dist, name) for name in (*_GROUPS, *(FUNCTIONS if lazy else ()))}
        for name, function in before.items():
            setattr(dist, name, self._seen(function) if name in _GROUPS else self._seen_once(function, used))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)

    def end(self) -> dict[str, float]:
        """The engine is there; returns seconds by name."""
        rest = self._clock() - self._began - self._device_s - self._communicators_s
        return {"device_s": self._device_s, "communicators_s": self._communicators_s, "engine_s": max(0.0, rest)}

    def _seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def seen(*arguments: Any, **options: Any) -> Any:
            with self.meeting():
                return function(*arguments, **options)

        return seen

    def _seen_once(self, function: Callable[..., Any], used: set[str]) -> Callable[..., Any]:
        """The first call for each group; others count for nothing, also where somebody has kept this function."""

        @wraps(function)
        def seen(*arguments: Any, **options: Any) -> Any:
            name = _group_of(*arguments, *options.values())
            if name in used:
                return function(*arguments, **options)
            used.add(name)
            with self.meeting():
                return function(*arguments, **options)

        return seen


def _group_of(*values: Any) -> str:
    """Name of the group that a call is for; "" for that of all ranks, which need not be named, and where it is hidden
    in the operations of a batch."""
    group = next((value for value in values if isinstance(value, dist.ProcessGroup)), None)
    return "" if group is None or group is dist.group.WORLD else str(group.group_name)
