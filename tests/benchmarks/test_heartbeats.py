"""What 3,125 nodes cost their controller: heartbeats, the reports of 24,960 ranks after every step, and decisions."""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from launcher import adoption
from launcher.backend import AgentAddress, NodeInfo
from launcher.controller import Controller
from launcher.gang import Gang
from launcher.host.wire import BEATS
from launcher.lock import ControllerLock
from launcher.observation import Observation
from launcher.run import EventKind
from launcher.store import RunStore
from launcher.straggler import LEARNED, WARM_UP, WINDOW
from strategies.codec import from_json
from tests.benchmarks.planned import GANG, NODES, Planned, folder, pace
from tests.benchmarks.stats import Musts
from tests.support.scale.faults import Rates
from tests.support.scale.play import DETECT_S, SOCKETS_PER_NODE, Scenario, allow_sockets, request_for
from tests.support.scale.serve import told

STEPS = 2  # listened to
PAST = WARM_UP + LEARNED + WINDOW  # steps from which on slow ranks are looked for in every way


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


def turn_until(controller: Controller, holds: Callable[[], bool]) -> None:
    """Turn until something holds."""
    deadline = time.monotonic() + 240
    while not holds():
        controller.turn()
        assert time.monotonic() < deadline


def begun(controller: Controller, step_s: float) -> None:
    """Turn until the ranks train, and let the controller know a past of them: what it has to do for the first steps of
    an attempt is little, and the next step is one after which it looks at whole windows."""
    turn_until(controller, lambda: controller.state is not None and controller.state.training)
    assert controller.state is not None
    draw, placement = random.Random(1), controller.state.placement
    for step in range(1 - PAST, 1):
        for rank, node in ((rank, node) for node, ranks in placement.items() for rank in ranks):
            data = {"kind": "step", "rank": rank} | told(step, step_s, draw)
            controller.departure.stragglers.note(Observation(kind="report", node=node, time=time.time(), data=data))
        controller.turn(0.0)


@dataclass(kw_only=True, slots=True)
class Heard:
    """What a controller has done for a while: processor seconds of all turns and of the longest, in so many seconds,
    lines of the log, messages in bytes, steps."""

    used: float
    longest: float
    seconds: float
    lines: int
    size: int
    steps: int


def listen(controller: Controller, seconds: float) -> Heard:
    """Turn for a while."""
    state = controller.state
    assert state is not None
    lines, steps, size = len(controller.store.events()), state.last_step, received(controller)
    start, turns = time.monotonic(), [time.process_time()]
    while time.monotonic() < start + seconds:
        controller.turn()
        turns.append(time.process_time())
    return Heard(
        used=turns[-1] - turns[0],
        longest=max(after - before for before, after in itertools.pairwise(turns)),
        seconds=time.monotonic() - start,
        lines=len(controller.store.events()) - lines,
        size=received(controller) - size,
        steps=state.last_step - steps,
    )


def received(controller: Controller) -> int:
    """Bytes from all agents."""
    return sum(link.stream.received for link in controller.gang.links.values())


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_heartbeats_steps_and_decisions_of_3125_nodes(planned: Planned, musts: Musts) -> None:
    step_s = planned.step_s
    with folder() as root, real_time(root / "run", planned) as (controller, agents):
        begun(controller, step_s)
        heard = listen(controller, STEPS * step_s + 5.0)
        print(f"\n{NODES:,} nodes x 8, a beat every {DETECT_S / BEATS:g} s, lost after {DETECT_S:g} s")
        print(
            f"  {GANG * 8:,} ranks report steps of {step_s:.1f} s, all at once: {heard.steps} in {heard.seconds:.0f} s"
        )
        share = heard.used / heard.seconds
        musts.hold("controller, with all its turns / one core", share, "<", 0.1, ".1%")
        print(f"  {heard.size / heard.seconds / 1e3:.0f} kB/s heard, {heard.lines} lines in the log for it")
        musts.hold("the longest turn, with reports of a step, in s of a processor", heard.longest, "<", 0.5)
        assert heard.steps >= STEPS
        assert heard.lines == 0
        rows = []
        for place in (7, 1200, 3000):
            rows.append(one_failure(controller, agents, f"n{place:04d}"))
            begun(controller, step_s)
    print(f"  a node dies after a step's reports (median of {len(rows)}): seconds, all agents share another process")
    for name in ("seen", "decided", "placed", "spawned"):
        print(f"    {name:8} {statistics.median(row[name] for row in rows):6.3f} s after the one before")
    used = statistics.median(row["used"] for row in rows)
    print(f"    processor time of the controller, from the first of these reports until ranks train: {used:.2f} s")
    print("  placed: every node has told that its old ranks are gone and what its memory holds; spawned: its new ranks")
    musts.hold("the slowest decision, in s", max(row["decided"] for row in rows), "<", 1)
    musts.hold("from the death to the decision, in s", max(row["seen"] + row["decided"] for row in rows), "<", DETECT_S)


def one_failure(controller: Controller, agents: Agents, node: str) -> dict[str, float]:
    """Seconds between the stages of one recovery. The node dies as soon as all ranks have reported a step."""
    number, before, state = len(controller.store.events()), len(controller.run.attempts), controller.state
    assert state is not None
    steps = state.last_step
    agents.tell(f"dead {node}")
    turn_until(controller, lambda: state.last_step > steps or controller.state is not state)
    used = time.process_time()
    turn_until(controller, lambda: len(controller.run.attempts) > before)
    turn_until(controller, lambda: controller.state is not None and controller.state.training)
    used = time.process_time() - used
    died = float(agents.answer()["time"])
    events = controller.store.events()[number:]
    lost = [event.data["failure"]["node"] for event in events if event.kind is EventKind.FAILURE_DETECTED]
    assert lost == [node], "a machine this busy loses others, too"
    times = {event.kind: event.time for event in events}
    what, where = (event for event in events if event.kind is EventKind.DECISION)
    return {
        "seen": times[EventKind.FAILURE_DETECTED] - died,
        "decided": what.time - times[EventKind.FAILURE_DETECTED],
        "placed": where.time - what.time - float(what.data["delay_s"]),
        "spawned": times[EventKind.RANKS_SPAWNED] - where.time,
        "used": used,
    }
