"""Doubles for the controller: a gang whose observations are queued by the test, a backend that is a list, a clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.spec import CheckpointSpec, DataSpec, JobSpec, TrainSpec
from launcher.backend import AgentAddress, NodeInfo
from launcher.observation import Observation, ObservationKind
from launcher.request import LaunchRequest, RecoverySpec, TrackingSpec
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec


class FakeClock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class FakeGang:
    """Records what it is told to do; :meth:`say` queues what the next poll returns."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.queue: list[Observation] = []
        self.calls: list[tuple[Any, ...]] = []
        self.environments: list[dict[str, str]] = []
        self.in_memory: list[bool] = []  # of the orders to leave
        self.in_doubt = False

    def say(self, observed: ObservationKind, node: str, **data: Any) -> None:
        """Queue an observation of kind ``observed``; a report's own ``kind`` is part of ``data``."""
        self.queue.append(Observation(kind=observed, node=node, time=self.clock.time(), data=data))

    def connect(self, addresses: Sequence[AgentAddress]) -> None:
        known = {call[1] for call in self.calls if call[0] == "connect"}
        for address in addresses:
            if address.incarnation not in known:
                self.calls.append(("connect", address.incarnation))
                self.say("agent_up", address.node, attempt=0, ranks=[])

    def poll(self, timeout_s: float) -> list[Observation]:
        self.clock.now += timeout_s
        heard, self.queue = self.queue, []
        return [replace(seen, heard=seen.heard or self.clock.monotonic()) for seen in heard]

    def spawn(
        self,
        attempt: int,
        placement: Mapping[str, Sequence[int]],
        env_of: Callable[[int, int, int, int, str, int], dict[str, str]],
        *,
        kind: str,
        argv: Sequence[str],
        cwd: str,
    ) -> None:
        self.calls.append(("spawn", attempt, {node: list(ranks) for node, ranks in placement.items()}))
        for node_rank, ranks in enumerate(placement.values()):
            for local_rank, rank in enumerate(ranks):
                self.environments.append(env_of(rank, node_rank, local_rank, len(ranks), "127.0.0.1", 1))

    def kill(self, attempt: int, grace_s: float = 0.0) -> None:
        self.calls.append(("kill", attempt, grace_s))

    def leave(self, attempt: int, after: int, *, in_memory: bool = False) -> None:
        self.calls.append(("leave", attempt, after))
        self.in_memory.append(in_memory)

    def dump(self, attempt: int) -> None:
        self.calls.append(("dump", attempt))

    def ask_holdings(self, number: int) -> set[str]:
        self.calls.append(("holdings", number))
        return set()

    def drop(self, node: str, why: str) -> None:
        self.calls.append(("drop", node))

    def shutdown_agents(self) -> None:
        self.calls.append(("shutdown",))

    def close(self) -> None:
        self.calls.append(("close",))


class FakeBackend:
    """Nodes by name; an agent on each."""

    def __init__(self, names: Sequence[str], slots: int = 2) -> None:
        self.alive = {name: f"{name}-0" for name in names}
        self.slots = slots
        self.released = 0

    def nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node=name, address="127.0.0.1", slots=self.slots) for name in self.alive]

    def request_agents(self, count: int) -> None:
        return None

    def agents(self) -> list[AgentAddress]:
        return [
            AgentAddress(node=name, host="127.0.0.1", port=1, pid=1, slots=self.slots, incarnation=word)
            for name, word in self.alive.items()
        ]

    def forget(self, agent: AgentAddress) -> None:
        self.alive.pop(agent.node, None)

    def why_missing(self) -> str:
        return "the cluster is small"

    def release(self) -> None:
        self.released += 1

    def close(self) -> None:
        return None


def tiny_request(root: Path, *, name: str = "run", steps: int = 20, spares: int = 1, **recovery: Any) -> LaunchRequest:
    """Two nodes of two slots, four ranks."""
    model = ModelSpec(name="tiny", layers=2, hidden=8, heads=2, kv_heads=2, ffn=16, vocab=16, seq=8)
    plan = ParallelPlan(tp=2, pp=2, zero_stage=1, stages=(1, 1), micro_batch=1, grad_accum=2)
    job = JobSpec(
        run_id=name,
        kind="pretrain",
        model=model,
        plan=plan,
        batch=BatchSpec(global_batch=2, seq=8),
        train=TrainSpec(steps=steps),
        data=DataSpec(kind="stdlib"),
        checkpoint=CheckpointSpec(every=5),
        deepspeed={},
    )
    return LaunchRequest(
        run_name=name,
        run_dir=str(root / name),
        job=job,
        cluster=ClusterSpec(name="fake", kind="process", nodes=2, slots_per_node=2, spares=spares),
        recovery=RecoverySpec(**recovery),
        tracking=TrackingSpec(kind="none"),
    )
