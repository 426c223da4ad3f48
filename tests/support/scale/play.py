"""One simulated run: real controller, simulated cluster, and what came of it beside the planner's prediction."""

from __future__ import annotations

import resource
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jobs.paths import RunPaths
from jobs.spec import CheckpointSpec, DataSpec, JobSpec, TrainSpec
from launcher import adoption
from launcher.backend import NodeInfo
from launcher.controller import Controller
from launcher.gang import Gang
from launcher.host.wire import BEATS
from launcher.ledger import ledger
from launcher.lock import ControllerLock
from launcher.phase import Phase
from launcher.request import LaunchRequest, RecoverySpec, TrackingSpec
from launcher.run import EventKind, RunEvent, RunState, fold
from launcher.store import RunStore
from strategies.failures import Process, Standby, shares
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec
from tests.support.scale.clock import DAY_S, JumpSelector, SimClock
from tests.support.scale.faults import Rates, trace
from tests.support.scale.pace import Pace
from tests.support.scale.world import World

DETECT_S = 5.0
NEVER_S = 1e12
SOCKETS_PER_NODE = 3  # the agent's port, and both ends of its connection


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What is played.

    Attributes:
        gang_nodes: Nodes whose failures are drawn; the real gang.
        nodes: Nodes that are simulated for it; fewer than ``gang_nodes`` fold the same failures into a small cluster.
        spares: Nodes that stand by.
        days: Simulated days.
        pace: How fast the gang works and how it saves.
        rates: How often things fail.
        seed: Of the trace.
        patience_s: How long the controller waits for nodes before it gives up.
    """

    gang_nodes: int
    nodes: int
    spares: int
    days: float
    pace: Pace
    rates: Rates
    seed: int = 0
    patience_s: float = NEVER_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        state: Of the run.
        events: The event log.
        log_bytes: Its size.
        ledger: Seconds per class.
        goodput: Work that counted over wall clock, from the steps that were made.
        steps: Highest step.
        commits: Saves that were committed to disk.
        lost_steps: Steps that were made twice.
        worst: Most steps that were lost by a restart from memory (True), and by one from disk (False).
        from_memory: Restarts from memory.
        struck: Failures of the gang: (seconds, kind).
        in_recovery: How many of them came while it was recovering.
        read_s: Processor seconds in which the log is read, folded and accounted for.
        wall_s: Simulated seconds.
        real_s: Real seconds.
    """

    state: RunState
    events: list[RunEvent]
    log_bytes: int
    ledger: dict[str, float]
    goodput: float
    steps: int
    commits: int
    lost_steps: int
    worst: dict[bool, int]
    from_memory: int
    struck: list[tuple[float, str]]
    in_recovery: int
    read_s: float
    wall_s: float
    real_s: float

    @property
    def kinds(self) -> Counter[EventKind]:
        """How many events of each kind."""
        return Counter(event.kind for event in self.events)


class SimBackend:
    """The world as a :class:`launcher.backend.Backend`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.request_agents, self.agents, self.forget = world.request_agents, world.agents, world.forget
        self.why_missing, self.release, self.close = world.why_missing, world.release, world.close

    def nodes(self) -> list[NodeInfo]:
        """The nodes that exist."""
        return self.world.infos()


def request_for(
    root: Path, scenario: Scenario, model: ModelSpec, plan: ParallelPlan, batch: BatchSpec
) -> LaunchRequest:
    """What the controller is asked to run: no end of steps, no end of patience."""
    job = JobSpec(
        run_id=root.name,
        kind="pretrain",
        model=model,
        plan=plan,
        batch=batch,
        train=TrainSpec(steps=10**9, precision="bf16"),
        data=DataSpec(kind="stdlib"),
        checkpoint=CheckpointSpec(every=scenario.pace.disk_every, memory_every=scenario.pace.memory_every),
        deepspeed={},
    )
    return LaunchRequest(
        run_name=root.name,
        run_dir=str(root),
        job=job,
        cluster=ClusterSpec(
            name="sim", kind="existing", nodes=scenario.nodes, slots_per_node=8, spares=scenario.spares
        ),
        recovery=RecoverySpec(
            max_restarts=10**9,
            shrink=False,
            wait_for_nodes_s=scenario.patience_s,
            start_timeout_s=100 * (scenario.pace.restart_s + scenario.pace.write_s) + 3600.0,
            detect_s=DETECT_S,
        ),
        tracking=TrackingSpec(kind="none"),
    )


def play(root: Path, scenario: Scenario, *, model: ModelSpec, plan: ParallelPlan, batch: BatchSpec) -> Outcome:
    """Play a scenario in a fresh run directory.

    Args:
        root: The run directory; must not exist.
        scenario: What is played.
        model: What is trained.
        plan: Its plan, for ``scenario.nodes`` nodes of 8 devices.
        batch: The work of a step.
    """
    allow_sockets(SOCKETS_PER_NODE * (scenario.nodes + scenario.spares))
    request = request_for(root, scenario, model, plan, batch)
    RunStore.create(request)
    clock, began = SimClock(), time.monotonic()
    store = RunStore(root, wall=clock.time)
    faults = trace(
        scenario.rates, nodes=scenario.gang_nodes, spares=scenario.spares, days=scenario.days, seed=scenario.seed
    )
    world = World(
        paths=RunPaths(root),
        job=request.job,
        secret=store.secret(),
        clock=clock,
        pace=scenario.pace,
        faults=faults,
        nodes=scenario.nodes + scenario.spares,
        repair_s=scenario.rates.repair_s,
        apart=scenario.rates.apart,
        beat_s=DETECT_S / BEATS,
    )
    try:
        state = _control(store, request, world, clock, scenario.days * DAY_S)
        return _outcome(store, world, state, scenario, time.monotonic() - began)
    finally:
        world.close()


def _control(store: RunStore, request: LaunchRequest, world: World, clock: SimClock, until_s: float) -> RunState:
    """What :func:`launcher.supervise.control` does, with this clock, until the last day is over."""
    lock = ControllerLock.acquire(store.paths)
    world.stop_at(until_s)
    gang = Gang(
        store.secret(),
        lock.epoch,
        clock.monotonic,
        detect_s=request.recovery.detect_s,
        wall=clock.time,
        selector=JumpSelector(world),
    )
    world.gang = gang
    try:
        controller = Controller(store, request, SimBackend(world), gang=gang, lock=lock, clock=clock)
        adoption.begin(controller)
        while controller.phase is not Phase.END and clock.now < until_s:
            controller.turn()
    finally:
        gang.close()
        lock.release()
    world.finish()
    return controller.run.state


def _outcome(store: RunStore, world: World, state: RunState, scenario: Scenario, real_s: float) -> Outcome:
    wall_s, began = world.clock.now, time.process_time()
    events = store.events()
    fold(events)
    account = ledger(events[1:], store.metrics(), world.clock.time())
    read_s = time.process_time() - began
    return Outcome(
        state=state,
        events=events,
        log_bytes=store.paths.events.stat().st_size,
        ledger=account,
        goodput=world.done * scenario.pace.step_s / wall_s,
        steps=world.done,
        commits=world.commits,
        lost_steps=world.lost,
        worst=world.worst,
        from_memory=world.from_memory,
        struck=world.struck,
        in_recovery=world.struck_in_recovery,
        read_s=read_s,
        wall_s=wall_s,
        real_s=real_s,
    )


def predicted(scenario: Scenario) -> float:
    """The planner's goodput for the same intervals, failures and times (:mod:`strategies.failures`)."""
    pace, rates = scenario.pace, scenario.rates
    tier = pace.memory_every > 0
    down_s = rates.silent * (1 - rates.correlated) * DETECT_S + pace.restart_s
    what = Process(
        rate=rates.gang_per_s(scenario.gang_nodes),
        correlated=(0.0 if rates.apart else rates.correlated) if tier else 1.0,
        copy_s=pace.copy_s,
        replica_s=pace.replica_s if tier else 0.0,
        write_s=pace.write_s,
        memory_s=pace.memory_every * pace.step_s if tier else float("inf"),
        disk_s=pace.disk_every * pace.step_s,
        detect_s=down_s - pace.restart_s,
        recover_memory_s=down_s + pace.fetch_s,
        recover_disk_s=down_s + pace.write_s,
        repair_s=rates.repair_s,
    )
    standby = Standby(scenario.spares, breaks=rates.breaks)
    return shares(what, standby).goodput


def allow_sockets(count: int) -> None:
    """Raise the limit of open files as far as is needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard > 0 else wanted, hard))
