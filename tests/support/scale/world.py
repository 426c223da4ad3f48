"""All simulated nodes, what their ranks do, and what breaks them."""

from __future__ import annotations

import heapq
import itertools
import json
import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import generation_of
from jobs.paths import RunPaths
from jobs.spec import JobSpec
from launcher.backend import AgentAddress, NodeInfo
from launcher.gang import Gang
from launcher.host.wire import Message
from tests.support.scale.clock import DAY_S, EPOCH_S, SimClock
from tests.support.scale.faults import RACK_NODES, Fault
from tests.support.scale.node import SimNode
from tests.support.scale.pace import Pace, Stretch
from tests.support.scale.storage import Disk, Shelf, guests

IMPATIENCE_S = 60.0  # real seconds in which everything that was sent must have been read
END_S = 1e9  # later than any run
IDLE_STEP_S = 60.0  # longest step of the clock while the controller waits for something


@dataclass(kw_only=True, slots=True)
class Played:
    """One attempt, as its ranks live through it.

    Attributes:
        attempt: Its number.
        epoch: The controller that began it.
        nodes: Node of each place of the gang; filled as the orders arrive.
        world_size: Number of ranks.
        base: The step that it restores; 0 for the very beginning.
        memory: It restores from memory.
        spawned: Ranks that exist.
        broken: Something fell: no further step is made.
        stretch: Its steps, once they have begun.
    """

    attempt: int
    epoch: int
    world_size: int
    base: int
    memory: bool
    nodes: dict[int, str] = field(default_factory=dict)
    spawned: int = 0
    broken: bool = False
    stretch: Stretch | None = None


class World:
    """The cluster of one run; also its :class:`launcher.backend.Backend`.

    Args:
        paths: The run.
        job: What is trained.
        secret: The run's secret.
        clock: Moved by this world only.
        pace: How fast the gang works.
        faults: What breaks, in order.
        nodes: Number of nodes, spares included.
        slots: Devices per node.
        repair_s: Until a broken node is back.
        apart: A rack that fails takes nothing of the memory tier.
        beat_s: Between two signs of life of an agent.

    Attributes:
        done: Highest step that any attempt has made.
        lost: Steps that were made and are to be made again, over all failures.
        struck: Failures that struck the gang: (seconds since the start, kind).
        worst: Most steps that were lost by a restart from memory (True), and by one from disk (False).
        from_memory: Restarts from memory.
        commits: Saves that were committed to disk.
    """

    def __init__(
        self,
        *,
        paths: RunPaths,
        job: JobSpec,
        secret: bytes,
        clock: SimClock,
        pace: Pace,
        faults: Sequence[Fault],
        nodes: int,
        slots: int = 8,
        repair_s: float = 14400.0,
        apart: bool = False,
        beat_s: float = 1.0,
    ) -> None:
        self.clock = clock
        self.gang: Gang | None = None
        self.done = self.lost = 0
        self.struck: list[tuple[float, str]] = []
        self.struck_in_recovery = 0
        self.from_memory = self.commits = 0
        self.worst = {False: 0, True: 0}
        self._paths, self._secret = paths, secret
        self._pace, self._slots, self._repair_s, self._beat_s = pace, slots, repair_s, beat_s
        self._apart, self._disk = apart, Disk(paths, job)
        self._broke_at = 0  # the step that had been made when it broke last
        self._selector = selectors.DefaultSelector()
        self._numbers = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._gang_faults = iter([fault.at_s for fault in faults if fault.kind != "spare"])
        self._next_fault_s = next(self._gang_faults, END_S)
        self._end_s = END_S
        self._played: Played | None = None
        self._beat_at = self._idle_since = 0.0
        self._forgotten: set[str] = set()
        self.nodes: dict[str, SimNode] = {}
        for index in range(nodes):
            self._boot(f"n{index:04d}")
        for fault in faults:
            self._at(fault.at_s, lambda fault=fault: self._strike(fault))  # type: ignore[misc]

    # --- a backend ------------------------------------------------------------------------------------------------

    def nodes_up(self) -> list[SimNode]:
        """Every node that lives and speaks."""
        return [node for node in self.nodes.values() if not node.gone and not node.silent]

    def agents(self) -> list[AgentAddress]:
        """Where the agents are."""
        found = (node.address for node in self.nodes.values() if not node.gone)
        return [address for address in found if address.incarnation not in self._forgotten]

    def forget(self, agent: AgentAddress) -> None:
        """The controller gave it up."""
        self._forgotten.add(agent.incarnation)

    def why_missing(self) -> str:
        """Why nodes are missing."""
        return f"{len(self.nodes) - len(self.nodes_up())} nodes are under repair"

    def release(self) -> None:
        """The run has ended."""

    def close(self) -> None:
        """Switch everything off."""
        for node in self.nodes.values():
            node.die()
        self._selector.close()

    # --- time -----------------------------------------------------------------------------------------------------

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._numbers), act))

    def serve(self) -> None:
        """Let the agents read what has come for them, and answer."""
        while ready := self._selector.select(0):
            for key, _ in ready:
                key.data()

    def settled(self) -> bool:
        """No byte is under way in either direction, and every end of a connection was noticed."""
        assert self.gang is not None
        for name, link in self.gang.links.items():
            node = self.nodes[name]
            if node.silent and node.address == link.address:
                continue
            if node.gone or node.address != link.address or not link.up or not node.delivered(link.stream):
                self._waited_since = self._waited_since or time.monotonic()
                assert time.monotonic() - self._waited_since < IMPATIENCE_S, (
                    f"{name} and its controller are out of step"
                )
                return False
        self._waited_since = 0.0
        return True

    _waited_since = 0.0

    def rest(self) -> None:
        """Give the kernel a moment to deliver."""
        self._selector.select(0.0005)

    def advance(self, at_most_s: float) -> None:
        """Move the clock to what happens next, by at most ``at_most_s`` while the controller is busy."""
        now = self.clock.now
        target = self._due[0][0] if self._due else now + DAY_S
        if not self._quiet():
            patient_s = max(at_most_s, min(IDLE_STEP_S, (now - self._idle_since) / 20))
            target = min(target, now + patient_s)
        else:
            self._idle_since = target
        self.clock.now = max(target, now + 1e-6)
        while self._due and self._due[0][0] <= self.clock.now:
            self._idle_since = self.clock.now
            heapq.heappop(self._due)[2]()
        if self.clock.now >= self._beat_at:
            self._beat_at = self.clock.now + self._beat_s
            for node in self.nodes_up():
                node.beat()
        self._report_step()

    def _quiet(self) -> bool:
        """The ranks are at work, and nobody is about to be missed: the next thing that happens is known."""
        if self.gang is None or self._played is None or self._played.broken:
            return False
        if self._played.spawned < self._played.world_size:
            return False
        linked = self.gang.links
        return not any(node.silent and node.name in linked for node in self.nodes.values() if not node.gone)

    # --- what ranks do --------------------------------------------------------------------------------------------

    def _boot(self, name: str) -> None:
        self.nodes[name] = SimNode(
            name=name,
            slots=self._slots,
            secret=self._secret,
            selector=self._selector,
            wall=self.clock.time,
            heard=self._heard,
        )

    def _heard(self, node: SimNode, message: Message) -> None:
        if message["op"] == "spawn":
            self._spawned(node, message)
        elif message["op"] == "kill" and self._played and int(message["attempt"]) >= self._played.attempt:
            self._break()
            self._played = None

    def _spawned(self, node: SimNode, order: Message) -> None:
        env = order["env"] | order["ranks"][0]["env"]
        played = self._played
        if played is None or played.attempt != order["attempt"]:
            base, memory = self._resumed(env["PHALANX_RESUME_FROM"])
            played = Played(
                attempt=order["attempt"],
                epoch=order["epoch"],
                world_size=int(env["WORLD_SIZE"]),
                base=base,
                memory=memory,
            )
            self._played = played
        played.nodes[int(env["GROUP_RANK"])] = node.name
        played.spawned += len(order["ranks"])
        if played.spawned == played.world_size:
            read_s = 0.0
            if played.base:
                read_s = self._pace.fetch_s if played.memory else self._pace.write_s
            self._at(self.clock.now + self._pace.restart_s + read_s, lambda: self._train(played))

    def _resumed(self, name: str) -> tuple[int, bool]:
        """The step that an attempt restores, and whether from memory."""
        generation = generation_of(name)
        if generation is not None:
            base = generation.step
        else:
            base = int(json.loads(Path(name).read_text())["step"]) if name else 0
        lost, self._broke_at = max(0, self._broke_at - base), base
        self.lost += lost
        self.from_memory += generation is not None
        self.worst[generation is not None] = max(self.worst[generation is not None], lost)
        return base, generation is not None

    def _train(self, played: Played) -> None:
        """The first step begins."""
        if played is not self._played or played.broken:
            return
        played.stretch = Stretch(pace=self._pace, begin_s=self.clock.now, base=played.base)
        self._first(played).report("training", step=played.base + 1)
        self._await_commit(played, played.base)

    def _first(self, played: Played) -> SimNode:
        return self.nodes[played.nodes[0]]

    def _await_commit(self, played: Played, after: int) -> None:
        """Rank 0 tells of every checkpoint when it is on disk, and how long ranks stood still for that one."""
        assert played.stretch is not None
        step = (after // self._pace.disk_every + 1) * self._pace.disk_every
        at_s = played.stretch.committed_s(step, self._pace.write_s)
        if at_s < min(self._next_fault_s, self._end_s):
            self._at(at_s, lambda: self._report_commit(played, step))

    def _report_commit(self, played: Played, step: int) -> None:
        if played is not self._played or played.broken:
            return
        path = str(self._paths.checkpoints / f"step-{step:08d}")
        self._first(played).report("checkpoint", step=step, path=path, bytes=0, stall_s=self._pace.copy_s)
        self._await_commit(played, step)

    def _report_step(self) -> None:
        played = self._played
        if played is not None and played.stretch is not None and not played.broken:
            step = played.stretch.done(self.clock.now)
            if step > played.base:
                self._first(played).report("step", step=step, next="step")

    def stop_at(self, at_s: float) -> None:
        """The clock passes no further than the last day without a look at it."""
        self._end_s = at_s
        self._at(at_s, lambda: None)

    def finish(self) -> None:
        """The last day is over: write down how far the ranks have come."""
        self._break()

    # --- what breaks ----------------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "spare":
            self._strike_spare(fault)
            return
        self._next_fault_s = next(self._gang_faults, END_S)
        played = self._played
        self.struck.append((self.clock.now, fault.kind))
        self.struck_in_recovery += played is None or played.broken or played.stretch is None
        victims = self._victims(fault.place, RACK_NODES if fault.kind == "rack" else 1)
        self._break()
        for node in victims:
            if fault.kind == "crash":
                self._crash(node)
            else:
                self._take(node, silently=fault.kind == "silent")

    def _victims(self, place: float, count: int) -> list[SimNode]:
        """Living nodes of the gang from a place on; before there is a gang, of all nodes."""
        played = self._played
        members = [played.nodes[at] for at in sorted(played.nodes)] if played else sorted(self._last_nodes)
        living = [self.nodes[name] for name in members or sorted(self.nodes)]
        living = [node for node in living if not node.gone and not node.silent]
        start = int(place * len(living))
        return (living[start:] + living[:start])[:count]

    _last_nodes: Sequence[str] = ()

    def _strike_spare(self, fault: Fault) -> None:
        busy = set(self._played.nodes.values()) if self._played else set(self._last_nodes)
        idle = [node for node in self.nodes_up() if node.name not in busy]
        if idle:
            self._take(idle[int(fault.place * len(idle))], silently=False)

    def _take(self, node: SimNode, *, silently: bool) -> None:
        if silently:
            node.fall_silent()
        else:
            node.die()
        self._at(self.clock.now + self._repair_s, lambda: self._repair(node))

    def _repair(self, node: SimNode) -> None:
        node.die()
        self._boot(node.name)

    def _crash(self, node: SimNode) -> None:
        if node.ranks:
            exited = {"pid": 1000 + node.ranks[0], "code": None, "signal": 9, "requested": False, "log_tail": ""}
            node.report("exit", **exited)

    def _break(self) -> None:
        """No step is made from here on; what is saved by now is what there is."""
        played = self._played
        if played is None or played.broken:
            return
        played.broken = True
        self._last_nodes = [played.nodes[at] for at in sorted(played.nodes)]
        stretch, now = played.stretch, self.clock.now
        if stretch is None:
            return
        token, step = Token(played.epoch, played.attempt), stretch.saved(now, disk=True)
        self._disk.commit(step, token, self.clock.time())
        self.commits += stretch.copies(step, disk=True) if step else 0
        self._shelve(played, token, stretch.saved(now, disk=False))
        self._broke_at = stretch.done(now)
        self._write_metrics(played, self._broke_at)

    def _shelve(self, played: Played, token: Token, step: int) -> None:
        """What the nodes of the gang hold in memory; before its first save, it is still what they held before."""
        if not step:
            return
        before = step - self._pace.memory_every
        steps = (before, step) if before > played.base else (step,)
        kept, places = guests(len(played.nodes), apart=self._apart), played.nodes
        ranks = {place: self.nodes[name].ranks for place, name in places.items()}
        for place, name in places.items():
            replicas = ranks[kept[place]] if place in kept else []
            shelf = Shelf(token=token, steps=steps, own=ranks[place], replicas=replicas, world=played.world_size)
            self.nodes[name].shelf = shelf

    def _write_metrics(self, played: Played, step: int) -> None:
        """The lines of metrics.jsonl that the ledger needs: the end of the repetition, and the end; each with the stall
        of all copies since the one before that only memory keeps."""
        stretch, paid_s = played.stretch, 0.0
        assert stretch is not None
        marks = {mark for mark in (min(self.done, step), step) if mark > played.base}
        with open(self._paths.metrics, "a") as file:
            for mark in sorted(marks):
                line = {"attempt": played.attempt, "step": mark, "time": EPOCH_S + stretch.ends_s(mark)}
                stall_s = (stretch.copies(mark - 1) - stretch.copies(mark - 1, disk=True)) * self._pace.copy_s
                file.write(json.dumps(line | {"stall_s": stall_s - paid_s}) + "\n")
                paid_s = stall_s
        self.done = max(self.done, step)

    # --- what a backend has besides ---------------------------------------------------------------------------------

    def request_agents(self, count: int) -> None:
        """Every node has its agent already."""

    def infos(self) -> list[NodeInfo]:
        """The nodes that exist."""
        return [NodeInfo(node=node.name, address="127.0.0.1", slots=self._slots) for node in self.nodes.values()]
