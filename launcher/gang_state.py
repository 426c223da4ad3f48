"""What the controller knows of the gang of one attempt, and what follows from what its agents say.

No I/O but for :func:`spawn`.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.spec import RankEnv
from launcher import recovery
from launcher.gang import EnvOf, Gang, Observation
from launcher.recovery import Failure, FailureKind
from launcher.request import LaunchRequest
from launcher.run import EventKind
from strategies.plan import ParallelPlan
from strategies.topology import Topology

_BUILT: Mapping[str, Callable[[float, float], float]] = {"device_s": max, "communicators_s": min, "engine_s": max}


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something worth a line in the event log."""

    kind: EventKind
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Notice:
    """A node will be taken away: what is known of it, for people, and how long after the word of it (seconds)."""

    detail: str
    within_s: float


@dataclass(kw_only=True, slots=True)
class GangState:
    """The ranks of one attempt, as far as their agents have told.

    Attributes:
        attempt: Number of the attempt.
        plan: Its plan; smaller than the request's where nodes were missing.
        placement: Node -> global ranks on it, in gang order.
        script: The ranks are a user's script, which sends no reports.
        resume_from: What the ranks restore.
        spawned: Node -> rank -> process id.
        stopped: Nodes on which no rank of the attempt is left.
        dying: Node to what was killed there and has not ended: rows of ``rank``, ``pid`` and ``state``.
        gone: Nodes that were lost, or that said they were leaving.
        finished: Ranks that exited with code 0.
        errors: ``error`` reports by rank.
        commits: Steps of this attempt whose checkpoint is in the log already.
        unsaved: When a rank told of a checkpoint that could not be written, as far as it is in the log: UTC seconds by
            the clock of its node, for another controller may set another clock beside it.
        afresh: Nodes whose ranks did not come from the warm pool, as far as it is in the log already.
        evidence: Failures, in order of arrival.
        first_step: First step that the attempt runs.
        last_step: Highest step that a rank has reported.
        copies_every: Steps between two copies in memory, 0 for none, as a rank has told last; None while none has.
        restored: What ranks have read back: ``restored_s`` of the slowest, ``restored_bytes`` of all (from disk each
            byte once, whoever needs it; from memory as often as there are ranks that need it); may be empty.
        built: How long ranks took to build their engines, by part (:mod:`jobs.build_time`), as far as told: the most
            of any, but the least that any took to meet the others, for the rest of that is waiting for who came last.
        training: The first step has begun.
        leaving: Why the next attempt will be made (``grow``, ``move``), once the ranks were asked to leave.
        leave_after: After this step, if not at an earlier checkpoint; 0 for none.
        asked: They were asked to leave at some time. Where that was taken back, they may have read it all the same.
        notices: Nodes that will be taken away.
        remaining_s: Node to how long it had left when this controller met it, for one that was told before.
    """

    attempt: int
    plan: ParallelPlan
    placement: Mapping[str, Sequence[int]]
    script: bool = False
    resume_from: str = ""
    spawned: dict[str, dict[int, int]] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    dying: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    errors: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    commits: set[int] = field(default_factory=set)
    unsaved: set[float] = field(default_factory=set)
    afresh: set[str] = field(default_factory=set)
    evidence: list[Failure] = field(default_factory=list)
    first_step: int = 1
    last_step: int = 0
    copies_every: int | None = None
    restored: dict[str, float] = field(default_factory=dict)
    built: dict[str, float] = field(default_factory=dict)
    training: bool = False
    leaving: str = ""
    leave_after: int = 0
    asked: bool = False
    notices: dict[str, Notice] = field(default_factory=dict)
    remaining_s: dict[str, float] = field(default_factory=dict)
    _world: int = field(init=False)
    _placed_at: float = field(init=False, default=0.0)  # the last node's ranks (UTC seconds)
    _began: tuple[int, float] | None = field(init=False, default=None)  # step, UTC seconds

    def __post_init__(self) -> None:
        self._world = sum(len(ranks) for ranks in self.placement.values())

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world

    @property
    def all_spawned(self) -> bool:
        """Every node has told the process ids of its ranks."""
        return len(self.spawned) == len(self.placement)

    @property
    def all_finished(self) -> bool:
        """Every rank has exited with code 0."""
        return len(self.finished) == self.world_size

    @property
    def nodes(self) -> dict[int, str]:
        """Rank to its node."""
        return {rank: node for node, ranks in self.placement.items() for rank in ranks}

    @property
    def all_stopped(self) -> bool:
        """No node has a rank of this attempt any more."""
        return self.stopped >= set(self.placement)

    def rank_table(self) -> list[dict[str, Any]]:
        """Where every rank runs: rank, node, process id and coordinates, in the order of the ranks."""
        topology = Topology(self.plan)
        where = sorted((rank, node, pid) for node, pids in self.spawned.items() for rank, pid in pids.items())
        at = [topology.coordinates(rank) for rank, _, _ in where]
        return [
            {"rank": rank, "node": node, "pid": pid, "coordinates": {"pipe": c.pipe, "data": c.data, "model": c.model}}
            for (rank, node, pid), c in zip(where, at, strict=True)
        ]

    def observe(self, seen: Observation) -> list[Note | Failure]:
        """Take in what one agent says; returns what to record and what to suspect.

        Saying the same thing twice (an agent replays after an adoption) has no further effect.
        """
        if seen.node not in self.placement:
            return []
        if seen.kind in ("agent_lost", "leaving"):
            return self._node_gone(seen)
        if seen.kind == "notice":
            return self._on_notice(seen)
        if int(seen.data.get("attempt", self.attempt)) != self.attempt:
            return []
        handler = _HANDLERS.get(seen.kind)
        return handler(self, seen) if handler else []

    def _node_gone(self, seen: Observation) -> list[Note | Failure]:
        if seen.node in self.gone:
            return []
        self.gone.add(seen.node)
        self.stopped.add(seen.node)
        if self.finished >= set(self.placement[seen.node]):
            return []  # nothing of the attempt is left there
        leaving = seen.kind == "leaving"
        why = str(seen.data.get("why") or seen.data.get("reason") or "")
        lost = FailureKind.PARTITIONED if seen.data.get("silent") else FailureKind.NODE_LOST
        return [
            Failure(
                kind=FailureKind.PREEMPTED if leaving else lost,
                time=seen.time,
                node=seen.node,
                step=self.last_step,
                detail=f"node {seen.node} {'is leaving' if leaving else 'was lost'}: {why}",
            )
        ]

    def _on_notice(self, seen: Observation) -> list[Note | Failure]:
        """A node will be taken away. Before the first step there is nothing to save, and another place to go to."""
        if seen.node in self.notices or seen.node in self.gone:
            return []
        within_s = self.remaining_s.get(seen.node, float(seen.data.get("within_s", 0.0)))
        detail = f"node {seen.node} will be taken away in {within_s:.0f} s ({seen.data.get('reason', '')})"
        self.notices[seen.node] = Notice(detail, within_s)
        if self.training:
            return []
        return [Failure(kind=FailureKind.PREEMPTED, time=seen.time, node=seen.node, detail=detail)]

    def _on_spawned(self, seen: Observation) -> list[Note | Failure]:
        if seen.node in self.spawned:
            return []
        self.spawned[seen.node] = {int(entry["rank"]): int(entry["pid"]) for entry in seen.data["ranks"]}
        self._placed_at = max(self._placed_at, seen.time)
        if not self.all_spawned:
            return []
        told = {"ranks": self.world_size, "resume_from": self.resume_from, "began": self._placed_at}
        if self.script:
            self._began = self.first_step, self._placed_at
        return [Note(kind=EventKind.RANKS_SPAWNED, data=told), *self._begin_training()]

    def _on_killed(self, seen: Observation) -> list[Note | Failure]:
        self.stopped.add(seen.node)
        return []

    def _on_dying(self, seen: Observation) -> list[Note | Failure]:
        """Told once per node, though what is waited for may change."""
        known = seen.node in self.dying
        self.dying[seen.node] = left = list(seen.data["left"])
        data = {"node": seen.node, "left": left, "waited_s": seen.data.get("waited_s", 0.0)}
        return [] if known else [Note(kind=EventKind.RANKS_DYING, data=data)]

    def give_up(self, node: str) -> None:
        """Whatever is left of the attempt on a node is not waited for any more, and its loss is no news."""
        self.gone.add(node)
        self.stopped.add(node)

    def _on_pool(self, seen: Observation) -> list[Note | Failure]:
        if seen.data.get("state") != "fresh" or seen.node in self.afresh:
            return []
        self.afresh.add(seen.node)
        return [Note(kind=EventKind.POOL_UNSAFE, data={"node": seen.node, "reason": seen.data.get("reason", "")})]

    def _on_exit(self, seen: Observation) -> list[Note | Failure]:
        rank = int(seen.data["rank"])
        if seen.data.get("code") == 0:
            self.finished.add(rank)
            return []
        if seen.data.get("requested") and seen.data.get("signal"):
            return []  # the controller asked for it; one that had an exit code of its own fell before
        failure = recovery.classify_exit(seen.data, node=seen.node, when=seen.time, error=self.errors.get(rank))
        return [recovery.at_step(failure, self.last_step + 1)]

    def _on_report(self, seen: Observation) -> list[Note | Failure]:
        data = seen.data
        rank, kind = int(data["rank"]), data["kind"]
        if kind == "step":
            self.last_step = max(self.last_step, int(data["step"]))
            if "copies_every" in data:
                self.copies_every = int(data["copies_every"])
        elif kind == "training" and rank == 0:
            self._began = int(data["step"]), seen.time
            return self._begin_training()
        elif kind == "checkpoint" and int(data["step"]) not in self.commits:
            self.commits.add(int(data["step"]))
            named: tuple[str, ...] = ("step", "path", "bytes", "written_bytes", "stall_s")
            return [Note(kind=EventKind.CHECKPOINT_COMMITTED, data={key: data[key] for key in named if key in data})]
        elif kind == "unsaved" and (told := float(data.get("time", seen.time))) not in self.unsaved:
            self.unsaved.add(told)
            known = {"step": int(data["step"]), "reason": str(data.get("reason", "")), "told": told}
            known["stall_s"] = float(data.get("stall_s", 0.0))
            return [Note(kind=EventKind.CHECKPOINT_FAILED, data=known)]
        elif kind == "error":
            self.errors[rank] = data
        elif kind == "built":
            self._note_built(data)
        elif kind == "restored":
            self._note_restored(data)
        elif kind == "blow_up":
            step, detail = int(data["step"]), f"training blew up at step {data['step']}: {data.get('why', '')}"
            found = Failure(kind=FailureKind.NUMERIC, time=seen.time, node=seen.node, rank=rank, step=step)
            return [replace(found, detail=detail, samples=int(data["samples"]))]
        elif kind == "rejected":
            detail = f"checkpoint {data['path']} is damaged: {data.get('reason', '')}"
            return [
                Failure(
                    kind=FailureKind.CORRUPT_CHECKPOINT,
                    time=seen.time,
                    node=seen.node,
                    rank=rank,
                    detail=detail,
                    path=str(data["path"]),
                )
            ]
        return []

    def _begin_training(self) -> list[Note | Failure]:
        """Where a node's word of its ranks is still on its way, that is told first: they do run."""
        if self.training or self._began is None or not self.all_spawned:
            return []
        self.training = True
        step, at = self._began
        told = {"step": step, "began": at, **self.built, **self.restored}
        return [Note(kind=EventKind.TRAINING_STARTED, data=told)]

    def _note_built(self, data: Mapping[str, Any]) -> None:
        """Of the slowest rank each. Ranks meet when the slowest comes, so its own meeting is the one without a wait."""
        for name, of_all in _BUILT.items():
            if name in data:
                seconds = float(data[name])
                self.built[name] = of_all(self.built.get(name, seconds), seconds)

    def _note_restored(self, data: Mapping[str, Any]) -> None:
        """Once per rank and attempt, as a report of a rank is: ranks say it before rank 0 says that training begins."""
        known = self.restored
        known["restored_s"] = max(known.get("restored_s", 0.0), float(data.get("seconds", 0.0)))
        if "read_bytes" in data:
            known["restored_bytes"] = known.get("restored_bytes", 0.0) + float(data["read_bytes"])


_HANDLERS: Mapping[str, Callable[[GangState, Observation], list[Note | Failure]]] = {
    "spawned": GangState._on_spawned,
    "killed": GangState._on_killed,
    "dying": GangState._on_dying,
    "exit": GangState._on_exit,
    "report": GangState._on_report,
    "pool": GangState._on_pool,
}


def spawn(gang: Gang, request: LaunchRequest, state: GangState, epoch: int) -> None:
    """Start the ranks of an attempt.

    Raises:
        ClusterError: One of its nodes is gone.
    """
    job = request.job
    gang.spawn(
        state.attempt,
        state.placement,
        _environment_of(request, state, epoch),
        kind="script" if job.kind == "script" else "pretrain",  # to an agent, whatever our own worker does is one
        argv=shlex.split(job.command),
        cwd=job.workdir or request.run_dir,
    )


def _environment_of(request: LaunchRequest, state: GangState, epoch: int) -> EnvOf:
    """What makes the variables of each rank of an attempt, once the rendezvous is known."""

    @functools.cache
    def shared(local_world_size: int, address: str, port: int) -> dict[str, str]:
        return RankEnv(
            rank=0,
            local_rank=0,
            world_size=state.world_size,
            local_world_size=local_world_size,
            node_rank=0,
            master_addr=address,
            master_port=port,
            run_id=request.run_name,
            run_dir=request.run_dir,
            epoch=epoch,
            attempt=state.attempt,
            resume_from=state.resume_from,
        ).variables()

    def variables(
        rank: int, node_rank: int, local_rank: int, local_world_size: int, address: str, port: int
    ) -> dict[str, str]:
        own = RankEnv.own(rank=rank, local_rank=local_rank, node_rank=node_rank)
        return shared(local_world_size, address, port) | own

    return variables
