"""Which lanes of a rank's course a call of :mod:`torch.distributed` enters. Imports torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from jobs.course import Course, Entry, Kind

_PEERS = {"send": "dst", "recv": "src"}  # the parameter that names the peer; group_dst and group_src do, too
_TRANSFERS: dict[Any, Kind] = {dist.isend: "send", dist.irecv: "recv"}


class Lanes:
    """Keeps a course by the arguments of calls.

    Args:
        course: The course.
    """

    def __init__(self, course: Course) -> None:
        self._course = course
        self._known: dict[tuple[str, Any, int], int] = {}
        self._operations: dict[str, int] = {}

    def of(self, name: str, function: Callable[..., Any]) -> Callable[[Sequence[Any], Mapping[str, Any]], list[Entry]]:
        """What notes the entries of a call of ``function`` and returns them, given its arguments."""
        operation = self._operations.setdefault(name, len(self._operations))
        if name == "batch_isend_irecv":
            return lambda arguments, options: self._batch(arguments[0] if arguments else options["p2p_op_list"])
        places = {parameter: place for place, parameter in enumerate(inspect.signature(function).parameters)}

        def value(parameter: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
            place = places.get(parameter, len(arguments))
            return arguments[place] if place < len(arguments) else options.get(parameter)

        def collective(arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Entry]:
            return self._enter("all", value("group", arguments, options), -1, operation)

        def transfer(arguments: Sequence[Any], options: Mapping[str, Any]) -> list[Entry]:
            group, peer = value("group", arguments, options), value(_PEERS[name], arguments, options)
            inside = value(f"group_{_PEERS[name]}", arguments, options)
            if peer is None and inside is not None:
                peer = dist.get_process_group_ranks(group)[inside]
            kind: Kind = "send" if name == "send" else "recv"
            return [] if peer is None else self._enter(kind, group, int(peer), operation)

        return transfer if name in _PEERS else collective

    def _batch(self, operations: Sequence[Any]) -> list[Entry]:
        """Point-to-point operations that begin together."""
        entries = []
        for one in operations:
            kind = _TRANSFERS[one.op]
            entries += self._enter(kind, one.group, one.peer, self._operations.setdefault(kind, len(self._operations)))
        return entries

    def _enter(self, kind: Kind, group: Any, peer: int, operation: int) -> list[Entry]:
        key = (kind, group, peer)
        if key not in self._known:
            self._known[key] = self._lane(kind, group, peer)
        lane = self._known[key]
        return [self._course.enter(lane, operation)] if lane >= 0 else []

    def _lane(self, kind: Kind, group: Any, peer: int) -> int:
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            return -1  # this rank is not in it
        ranks = sorted(dist.get_process_group_ranks(group))
        if len(ranks) < 2:
            return -1
        return self._course.lane(kind, group.group_name, ranks if kind == "all" else [peer])
