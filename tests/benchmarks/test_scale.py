"""25,000 GPUs: what thousands of agents cost their controller, and what failures cost a run of 100 days.

``make bench`` prints the tables. ``PHALANX_SCALE_DAYS`` sets how many days are
played on all nodes (a day is some 22 recoveries, of some four seconds each on one core), the rest is played on a folded
cluster: the same failures on fewer nodes, which changes no decision and no time (tests/launcher/test_scale.py).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest

from launcher import adoption, build
from launcher.backend import AgentAddress, NodeInfo
from launcher.config import compose
from launcher.controller import Controller
from launcher.gang import Gang
from launcher.host.wire import BEATS
from launcher.lock import ControllerLock
from launcher.run import EventKind
from launcher.store import RunStore
from strategies.codec import from_json
from strategies.failures import Process
from strategies.plan import ParallelPlan
from strategies.reliability import RESTARTS_S, plan_process
from strategies.specs import BatchSpec, ModelSpec
from tests.benchmarks.stats import QUICK, Musts
from tests.support.scale.anchors import PUBLISHED
from tests.support.scale.faults import Rates
from tests.support.scale.pace import Pace
from tests.support.scale.play import (
    DETECT_S,
    SOCKETS_PER_NODE,
    Outcome,
    Scenario,
    allow_sockets,
    play,
    predicted,
    request_for,
)

NODES, GANG = 3125, 3120
FOLDED = 15  # one replica of the plan
DAYS = 100.0
FULL_DAYS = float(os.environ.get("PHALANX_SCALE_DAYS", "1"))
SPARES = 24  # enough for racks of four
LISTEN_S = 20.0
SAVINGS = ((1, 4), (2, 4), (0, 4), (0, 50))  # steps between copies in memory (0: none), and between saves to disk
BESIDE_S = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """gpt4_1800b as the planner sees it."""

    model: ModelSpec
    plan: ParallelPlan
    batch: BatchSpec
    step_s: float
    what: Process

    def on(self, nodes: int) -> ParallelPlan:
        """The plan for fewer nodes: fewer replicas of the same shape."""
        return self.plan if nodes == GANG else replace(self.plan, dp=nodes // FOLDED, ep=1)


@pytest.fixture(scope="module")
def planned() -> Planned:
    config = compose(["experiment=gpt4_1800b"])
    sketch = build.outline(config)
    work = build.workload(config, sketch)
    assert work is not None
    from strategies.estimate import Estimator

    step_s = sum(Estimator(work).timing.step(sketch.plan))
    what, _ = plan_process(work, sketch.plan, step_s)
    return Planned(model=sketch.model, plan=sketch.plan, batch=work.batch, step_s=step_s, what=what)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: a hundred days are some twenty thousand durable lines."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


# --- heartbeats and decisions, in real time ---------------------------------------------------------------------------


class Agents:
    """Thousands of agents in a process of their own; also a backend."""

    def __init__(self, store: RunStore, nodes: int, step_s: float) -> None:
        command = [sys.executable, "-P", "-m", "tests.support.scale.serve", str(store.paths.secret)]
        self.process = subprocess.Popen(
            [*command, str(nodes), str(step_s)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._alive = {one["node"]: from_json(AgentAddress, one) for one in self.answer()}

    def answer(self) -> Any:
        """One line of the process."""
        return json.loads(_end(self.process.stdout).readline())

    def tell(self, line: str) -> None:
        """One line to the process."""
        pipe = _end(self.process.stdin)
        pipe.write(f"{line}\n".encode())
        pipe.flush()

    def nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node=one.node, address=one.host, slots=one.slots) for one in self._alive.values()]

    def request_agents(self, count: int) -> None:
        return None

    def agents(self) -> list[AgentAddress]:
        return list(self._alive.values())

    def forget(self, agent: AgentAddress) -> None:
        self._alive.pop(agent.node, None)

    def why_missing(self) -> str:
        return "they were killed"

    def release(self) -> None:
        return None

    def close(self) -> None:
        self.tell("end")
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            _end(pipe).close()


def _end(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


@contextmanager
def real_time(root: Path, planned: Planned) -> Iterator[tuple[Controller, Agents]]:
    """A controller in this process, all agents in another."""
    scenario = Scenario(
        gang_nodes=GANG, nodes=GANG, spares=NODES - GANG, days=0, pace=pace(planned, 30.0), rates=Rates()
    )
    request = request_for(root, scenario, planned.model, planned.plan, planned.batch)
    store = RunStore.create(request)
    allow_sockets(SOCKETS_PER_NODE * NODES)
    agents = Agents(store, NODES, planned.step_s)
    lock = ControllerLock.acquire(store.paths)
    gang = Gang(store.secret(), lock.epoch, detect_s=DETECT_S, lease_s=request.recovery.lease_s)
    try:
        controller = Controller(store, request, agents, gang=gang, lock=lock, clock=time)
        adoption.begin(controller)
        yield controller, agents
    finally:
        gang.close()
        lock.release()
        agents.close()


def turn_until(controller: Controller, holds: Any) -> None:
    """Turn until something holds."""
    deadline = time.monotonic() + 120
    while not holds():
        controller.turn()
        assert time.monotonic() < deadline


def listen(controller: Controller, seconds: float) -> tuple[float, int, int]:
    """Turn for a while: share of one core, lines in the log, messages heard."""
    before = len(controller.store.events())
    heard = sum(link.stream.received for link in controller.gang.links.values())
    start, used = time.monotonic(), time.process_time()
    while time.monotonic() < start + seconds:
        controller.turn()
    share = (time.process_time() - used) / (time.monotonic() - start)
    heard = sum(link.stream.received for link in controller.gang.links.values()) - heard
    return share, len(controller.store.events()) - before, heard


@pytest.mark.full
def test_heartbeats_and_decisions_of_3125_nodes(planned: Planned, musts: Musts) -> None:
    with folder() as root, real_time(root / "run", planned) as (controller, agents):
        turn_until(controller, lambda: controller.state is not None and controller.state.training)
        share, lines, heard = listen(controller, LISTEN_S)
        beats = NODES * BEATS * LISTEN_S / DETECT_S
        print(
            f"\n{NODES:,} nodes x 8, a beat every {DETECT_S / BEATS:g} s, lost after {DETECT_S:g} s, {beats:,.0f} beats"
        )
        musts.hold("controller, with all its turns / one core", share, "<", 0.1, ".1%")
        print(f"  {heard / LISTEN_S / 1e3:.0f} kB/s heard, {lines} lines in the log for it")
        assert lines <= 1  # the first checkpoint, at most
        rows = [one_failure(controller, agents, f"n{place:04d}") for place in (7, 1200, 3000)]
    print(f"  a node dies (median of {len(rows)}): seconds of wall clock, all agents sharing one other process")
    for name in ("seen", "decided", "placed", "spawned"):
        print(f"    {name:8} {statistics.median(row[name] for row in rows):6.3f} s after the one before")
    used = statistics.median(row["used"] for row in rows)
    print(f"    processor time of the controller, from the death to the first step: {used:.2f} s")
    print("  placed: every node has told that its old ranks are gone and what its memory holds; spawned: its new ranks")
    musts.hold("the slowest decision, in s", max(row["decided"] for row in rows), "<", 1)


def one_failure(controller: Controller, agents: Agents, node: str) -> dict[str, float]:
    """Seconds between the stages of one recovery."""
    number, before = len(controller.store.events()), len(controller.run.attempts)
    agents.tell(f"dead {node}")
    used = time.process_time()
    turn_until(controller, lambda: len(controller.run.attempts) > before)
    turn_until(controller, lambda: controller.state is not None and controller.state.training)
    used = time.process_time() - used
    died = float(agents.answer()["time"])
    events = controller.store.events()[number:]
    times = {event.kind: event.time for event in events}
    what, where = (event for event in events if event.kind is EventKind.DECISION)
    return {
        "seen": times[EventKind.FAILURE_DETECTED] - died,
        "decided": what.time - times[EventKind.FAILURE_DETECTED],
        "placed": where.time - what.time - float(what.data["delay_s"]),
        "spawned": times[EventKind.RANKS_SPAWNED] - where.time,
        "used": used,
    }


# --- a hundred days ---------------------------------------------------------------------------------------------------


def pace(planned: Planned, restart_s: float, *, memory_every: int = 1, disk_every: int = 0) -> Pace:
    """The planner's times, with its own intervals unless others are asked for."""
    what = planned.what
    return Pace(
        step_s=planned.step_s,
        copy_s=what.copy_s,
        replica_s=what.replica_s,
        write_s=what.write_s,
        fetch_s=what.replica_s / 10,
        memory_every=memory_every,
        disk_every=disk_every or round(what.rounded(planned.step_s).disk_s / planned.step_s),
        restart_s=restart_s,
    )


def scenario(planned: Planned, restart_s: float, *, spares: int = SPARES, **saving: int) -> Scenario:
    """A hundred days on the folded cluster."""
    return Scenario(
        gang_nodes=GANG,
        nodes=FOLDED,
        spares=spares,
        days=DAYS,
        pace=pace(planned, restart_s, **saving),
        rates=Rates(),
        seed=1,
    )


def run(planned: Planned, what: Scenario) -> Outcome:
    with folder() as root:
        plan = planned.on(what.nodes)
        return play(root / "run", what, model=planned.model, plan=plan, batch=planned.batch)


def policies(planned: Planned, restart_s: float) -> list[tuple[str, Scenario]]:
    """Ours, and what others do, on the same failures."""
    half_hour = round(1800 / planned.step_s)
    return [
        ("memory every step, disk as planned", scenario(planned, restart_s)),
        ("... replicas in the next node", replace(scenario(planned, restart_s), rates=Rates(apart=False))),
        ("no memory tier, disk as planned", scenario(planned, restart_s, memory_every=0)),
        ("no memory tier, every 30 min", scenario(planned, restart_s, memory_every=0, disk_every=half_hour)),
        (
            "no memory tier, every 30 min, no spares",
            scenario(planned, restart_s, spares=0, memory_every=0, disk_every=half_hour),
        ),
    ]


def line(name: str, what: Scenario, out: Outcome) -> str:
    """One row of a table."""
    foreseen = predicted(what)
    return (
        f"  {name:42} {what.pace.restart_s:5.0f} s {out.goodput:7.2%} {foreseen:9.2%} {out.goodput - foreseen:+8.2%} "
        f"{len(out.struck):6,} {out.in_recovery:5,} {out.lost_steps:8,} {len(out.events):8,} {out.real_s:6.0f} s"
    )


HEAD = f"  {'goodput is simulated':42} restart simul. predicted differ. failures  in rec. steps lost   log lines   real"


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_goodput_of_a_hundred_days(planned: Planned, musts: Musts) -> None:
    print(f"\nsimulated: gpt4_1800b on {GANG:,} nodes x 8, step {planned.step_s:.1f} s, {DAYS:g} days, folded")
    print(HEAD)
    off = 0.0
    for restart_s in RESTARTS_S:
        for name, what in policies(planned, restart_s):
            out = run(planned, what)
            off = max(off, abs(out.goodput - predicted(what)))
            assert out.ledger["wall"] == pytest.approx(out.wall_s, rel=1e-6)
            print(line(name, what, out), flush=True)
    for name, share, source in PUBLISHED:
        print(f"  {name:42} {'':7} {share:>7}   published, of a real cluster, {source}")
    musts.hold("goodput, simulated, the farthest from the planner's prediction", off, "<=", 0.01, ".2%")


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_spares_and_intervals_that_reach_99_percent(planned: Planned, musts: Musts) -> None:
    """Restarts of 1 s. A copy stands still for what the planner reckons, or for 0.03 s: it is made beside the step."""
    days, spares = (1.0, (8, 24)) if os.environ.get(QUICK) else (10.0, (8, 12, 16, 20, 24))
    print(
        f"\nsimulated goodput, {GANG:,} nodes, {days:g} days, restart 1 s, step {planned.step_s:.1f} s; * reaches 99 %"
    )
    print(f"  {'memory':13} {'disk':16} {'a copy':>8}" + "".join(f"{one:4} spares " for one in spares))
    best = dict.fromkeys(spares, 0.0)
    for (memory, disk), copy_s in itertools.product(SAVINGS, (planned.what.copy_s, BESIDE_S)):
        if not memory and copy_s == BESIDE_S:
            continue  # it saves too seldom for that to matter
        cells = []
        for count in spares:
            what = scenario(planned, 1.0, spares=count, memory_every=memory, disk_every=disk)
            what = replace(what, days=days, pace=replace(what.pace, copy_s=copy_s))
            cells.append(run(planned, what).goodput)
            best[count] = max(best[count], cells[-1])
        row = "".join(f"{cell:10.2%}{'*' if cell >= 0.99 else ' '}" for cell in cells)
        where = f"{f'every {memory} steps' if memory else 'no':13} {f'every {disk} steps':16}"
        print(f"  {where} {copy_s:6.3f} s{row}", flush=True)
    musts.hold("simulated goodput of the best cell", max(best.values()), ">=", 0.99, ".2%")
    print(f"  simulated goodput with {spares[0]} spares, the best: {best[spares[0]]:.2%}")


@pytest.mark.full
def test_what_reaches_99_percent(planned: Planned) -> None:
    restarts = (1.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
    print(f"\nby the planner's formula, not simulated: {SPARES} spares, a save to disk every 4 steps; * reaches 99 %")
    print("  nodes  replicas    stall  memory every  " + "".join(f"  restart {one:3.0f} s" for one in restarts))
    reached = 0
    for nodes, apart, copy_s, every in itertools.product(
        (GANG, 2048, 1200), (False, True), (planned.what.copy_s, 0.1, 0.03), (1, 2, 4)
    ):
        base = scenario(planned, 1.0, memory_every=every, disk_every=4)
        cells = []
        for restart_s in restarts:
            tuned = replace(base.pace, copy_s=copy_s, restart_s=restart_s)
            cells.append(predicted(replace(base, gang_nodes=nodes, pace=tuned, rates=Rates(apart=apart))))
        reached += sum(cell >= 0.99 for cell in cells)
        where = "elsewhere" if apart else "same rack"
        row = "".join(f"{cell:13.2%}{'*' if cell >= 0.99 else ' '}" for cell in cells)
        print(f"  {nodes:5} {where:>9} {copy_s:6.3f} s  {every:5} steps  {row}")
    assert reached


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_all_nodes_and_the_folded_cluster_decide_alike(planned: Planned) -> None:
    folded = replace(scenario(planned, 30.0), days=FULL_DAYS)
    whole = replace(folded, nodes=GANG)
    outs = [run(planned, what) for what in (whole, folded)]
    shapes = [[(event.kind, round(event.time, 3)) for event in out.events[1:]] for out in outs]
    assert shapes[0] == shapes[1]
    assert (outs[0].steps, outs[0].lost_steps, outs[0].struck) == (outs[1].steps, outs[1].lost_steps, outs[1].struck)
    print(f"\nsimulated: {FULL_DAYS:g} days on all {GANG:,} nodes, {SPARES} spares, real sockets; folded: the same log")
    print(HEAD)
    for name, what, out in zip(("all nodes", "folded"), (whole, folded), outs, strict=True):
        print(line(name, what, out))
    first = max(len(json.dumps(dict(event.data))) for event in outs[0].events)
    rest = (outs[0].log_bytes - first) / len(outs[0].events)
    print(f"  log of all nodes: {first:,} bytes for the first gang, {rest:,.0f} bytes for every other line")
