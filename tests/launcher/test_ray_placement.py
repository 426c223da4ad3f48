"""Where agents go, on a cluster that is a list: what is reserved, started, explained and given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.paths import RunPaths
from launcher.backend import AgentAddress
from launcher.host import announce
from launcher.ray_placement import RESTART_AGENT_AFTER_S, SHUN_S, AgentPlacement, run_key
from launcher.ray_reservations import REFUSED_S, RESERVING_S, Bundle, RayNode, Resources, device_count
from strategies.specs import ClusterSpec


@dataclass
class FakeRay:
    """Places a group at once if it fits whole, else when it comes to fit; starts actors at once."""

    paths: RunPaths
    capacity: dict[str, dict[str, float]] = field(default_factory=dict)
    groups: dict[str, list[tuple[Resources, str]]] = field(default_factory=dict)
    bound: dict[str, list[str]] = field(default_factory=dict)  # group -> the only node of each bundle
    living: dict[str, str] = field(default_factory=dict)  # actor -> node
    started: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    obedient: bool = True
    broken: set[str] = field(default_factory=set)
    refuses: set[str] = field(default_factory=set)  # nodes that look free, and are not given to anybody
    once: set[str] = field(default_factory=set)  # groups that had their places

    def nodes(self) -> list[RayNode]:
        return [
            RayNode(node=node, address=f"10.0.0.{node}", total=total, free=self._free(node))
            for node, total in self.capacity.items()
        ]

    def _free(self, node: str) -> dict[str, float]:
        used = [wanted for group in self.groups.values() for wanted, where in group if where == node]
        return {kind: have - sum(want.get(kind, 0.0) for want in used) for kind, have in self.capacity[node].items()}

    def bundles(self, prefix: str) -> list[Bundle]:
        self._schedule()
        moving = {name for name in self.once & set(self.groups) if not all(where for _, where in self.groups[name])}
        return [
            Bundle(group=name, index=index, resources=wanted, node=where, moving=name in moving)
            for name, group in sorted(self.groups.items())
            for index, (wanted, where) in enumerate(group)
            if name.startswith(prefix)
        ]

    def _schedule(self) -> None:
        for name, group in self.groups.items():
            spread = [(wanted, where if where in self.capacity else "") for wanted, where in group]
            for index, (wanted, where) in enumerate(spread):
                taken = {node for _, node in spread}
                only = [self.bound[name][index]] if self.bound[name] else list(self.capacity)
                fits = [
                    node
                    for node in only
                    if node in set(self.capacity) - taken - self.refuses
                    and all(self._free(node).get(kind, 0.0) >= n for kind, n in wanted.items())
                ]
                if not where and fits:
                    spread[index] = (wanted, fits[0])
            atomic = all(where for _, where in spread) or any(where for _, where in group)
            self.groups[name] = spread if atomic else [(wanted, "") for wanted, _ in spread]
            if all(where for _, where in self.groups[name]):
                self.once.add(name)

    def reserve(self, group: str, bundles: Sequence[Resources], nodes: Sequence[str] = ()) -> None:
        assert group not in self.groups
        assert len(nodes) in (0, len(bundles))
        self.bound[group] = list(nodes)
        self.groups[group] = [(dict(bundle), "") for bundle in bundles]
        self._schedule()

    def unreserve(self, prefix: str) -> None:
        self.groups = {name: group for name, group in self.groups.items() if not name.startswith(prefix)}

    def start_agent(self, name: str, bundle: Bundle, arguments: tuple[Any, ...], run_dir: Path) -> object:
        _, node, address, slots, _ = arguments
        assert name not in self.living
        assert bundle.node == node
        self.started.append(node)
        if node not in self.broken:
            self.living[name] = node
            word = f"word{len(self.started)}"
            agent = AgentAddress(node=node, host=address, port=1, pid=1, slots=slots, incarnation=word)
            announce.write(self.paths, agent)
        return node

    def complaint(self, started: object) -> str:
        return "no such luck" if started in self.broken else ""

    def actors(self, prefix: str) -> set[str]:
        return {name for name, node in self.living.items() if node in self.capacity and name.startswith(prefix)}

    def stop(self, name: str, reason: str) -> None:
        self.stopped.append(name)
        if self.obedient:
            self.living.pop(name, None)

    def kill(self, name: str) -> None:
        self.killed.append(name)
        self.living.pop(name, None)


@dataclass
class Time:
    """A clock that only the test moves."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def ray(tmp_path: Path) -> FakeRay:
    return FakeRay(paths=RunPaths(tmp_path), capacity={str(n): {"CPU": 2.0} for n in range(4)})


@pytest.fixture
def clock() -> Time:
    return Time()


def placement(ray: FakeRay, clock: Time, *, nodes: int = 3, slots: int = 2) -> AgentPlacement:
    spec = ClusterSpec(name="test", kind="existing", nodes=nodes, slots_per_node=slots)
    return AgentPlacement(ray.paths.root, spec, ray, clock=clock, sleep=clock.sleep, agent_options={"grace_s": 1.0})


def where(placed: AgentPlacement) -> list[str]:
    return sorted(agent.node for agent in placed.agents())


def lose(ray: FakeRay, placed: AgentPlacement, nodes: Sequence[str]) -> None:
    """Nodes die, and the controller has seen it."""
    for agent in placed.agents():
        if agent.node in nodes:
            del ray.capacity[agent.node]
            placed.forget(agent)


def test_the_gang_is_one_group_and_each_spare_is_one(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(4)
    assert where(placed) == ["0", "1", "2"]
    assert sorted(len(group) for group in ray.groups.values()) == [1, 3]
    assert where(placed) == ["0", "1", "2", "3"]
    placed.request_agents(4)
    assert len(ray.started) == 4


def test_a_missing_spare_holds_nothing_up(ray: FakeRay, clock: Time) -> None:
    del ray.capacity["3"]
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(4)
    assert where(placed) == ["0", "1", "2"]
    clock.now += RESERVING_S
    assert placed.why_missing() == (
        "the cluster has 3 nodes with >= 2 free CPUs for this run (3 of that size are up), the run asks for 4"
    )
    ray.capacity["9"] = {"CPU": 2.0}
    placed.request_agents(4)
    assert where(placed) == ["0", "1", "2", "9"]


def test_a_gang_that_does_not_fit_takes_nothing_and_says_why(ray: FakeRay, clock: Time) -> None:
    del ray.capacity["3"], ray.capacity["2"]
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(4)
    assert placed.why_missing() == "4 nodes are being reserved"
    clock.now += RESERVING_S
    placed.request_agents(4)
    assert where(placed) == []
    assert ray.nodes()[0].free == {"CPU": 2.0}
    assert "the cluster has 2 nodes with >= 2 free CPUs" in placed.why_missing()
    ray.capacity["7"] = {"CPU": 2.0}
    for _ in range(2):
        assert where(placed) == []
    assert where(placed) == ["0", "1", "7"]
    assert [ray.bound[group] for group in ray.groups] == [["0", "1", "7"]]


def test_what_the_queue_grants_is_changed_for_whole_nodes_that_are_bound(ray: FakeRay, clock: Time) -> None:
    ray.capacity = {"0": {"CPU": 96.0, "GPU": 8.0}}
    placed = placement(ray, clock, nodes=2, slots=4)
    placed.request_agents(2)
    assert [wanted for wanted, _ in ray.groups.popitem()[1]] == [{"GPU": 4.0}] * 2
    placed.request_agents(2)
    ray.capacity["1"] = {"CPU": 64.0, "GPU": 6.0}
    for _ in range(3):
        placed.request_agents(2)
    ((bundles, bound),) = [(ray.groups[group], ray.bound[group]) for group in ray.groups]
    assert bundles == [({"CPU": 96.0, "GPU": 8.0}, "0"), ({"CPU": 64.0, "GPU": 6.0}, "1")]
    assert bound == ["0", "1"]
    assert where(placed) == ["0", "1"]


def test_a_node_that_goes_while_the_queue_grants_it_is_queued_for_again(ray: FakeRay, clock: Time) -> None:
    del ray.capacity["3"], ray.capacity["2"]
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    ray.capacity["7"] = {"CPU": 2.0}
    assert {bundle.node for bundle in ray.bundles("")} == {"0", "1", "7"}
    del ray.capacity["7"]
    for _ in range(3):
        clock.now += 1.0
        placed.request_agents(3)
    assert {bundle.node for bundle in ray.bundles("")} == {""}
    ray.capacity["8"] = {"CPU": 2.0}
    for _ in range(3):
        placed.request_agents(3)
    assert where(placed) == ["0", "1", "8"]


def test_nodes_that_look_free_and_are_not_given_are_asked_for_through_the_queue(ray: FakeRay, clock: Time) -> None:
    """One that is drained, or of which somebody took a little at that moment: only Ray knows which of them it is."""
    ray.capacity["4"] = {"CPU": 2.0}
    ray.refuses = {"0"}
    placed = placement(ray, clock, nodes=4)
    placed.request_agents(4)
    assert [ray.bound[group] for group in ray.groups] == [["0", "1", "2", "3"]]
    clock.now += RESERVING_S
    for _ in range(3):
        placed.request_agents(4)
    assert where(placed) == ["1", "2", "3", "4"]
    assert [sorted(ray.bound[group]) for group in ray.groups] == [["1", "2", "3", "4"]]


def test_a_lost_node_is_replaced_by_one_that_is_given(ray: FakeRay, clock: Time) -> None:
    ray.capacity["4"] = {"CPU": 2.0}
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    ray.refuses = {"3"}
    lose(ray, placed, ["0"])
    placed.request_agents(3)
    clock.now += RESERVING_S
    assert where(placed) == ["1", "2"]
    assert where(placed) == ["1", "2", "4"]


def test_nodes_in_the_place_of_lost_ones_come_one_by_one(ray: FakeRay, clock: Time) -> None:
    """Also when none of those is left that the gang began with."""
    placed = placement(ray, clock, nodes=4)
    placed.request_agents(4)
    for number in map(str, range(4)):
        lose(ray, placed, [number])
        placed.request_agents(4)
        ray.capacity[f"n{number}"] = {"CPU": 2.0}
        for _ in range(2):
            placed.request_agents(4)
        assert f"n{number}" in where(placed)
        assert len(where(placed)) == 4
    lose(ray, placed, ["n0", "n1", "n2"])
    ray.capacity["last"] = {"CPU": 2.0}
    for _ in range(2):
        placed.request_agents(4)
    assert where(placed) == ["last", "n3"]
    assert not any("-ticket-" in group for group in ray.groups)


def test_what_is_not_needed_any_more_is_not_waited_for(ray: FakeRay, clock: Time) -> None:
    """Nobody looks when all agents are there: it would be taken an hour later, for nothing."""
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    clock.now += RESTART_AGENT_AFTER_S
    ray.refuses = {"3"}
    placed.forget(placed.agents()[1])
    placed.request_agents(3)
    assert ["3"] in [ray.bound[group] for group in ray.groups]
    assert where(placed) == ["0", "1", "2"]
    ray.refuses = set()
    assert {bundle.node for bundle in ray.bundles("")} == {"0", "1", "2"}


def test_what_was_granted_and_is_of_no_use_is_not_asked_for_over_and_over(ray: FakeRay, clock: Time) -> None:
    """Ray grants processors of a node whose one GPU is all that a rank could have there."""
    ray.capacity = {"0": {"CPU": 8.0}, "1": {"CPU": 8.0, "GPU": 1.0}, "2": {"CPU": 1.0}}
    placed = placement(ray, clock, nodes=2, slots=4)
    for _ in range(30):
        clock.now += 0.3
        placed.request_agents(2)
    assert len(ray.bound) == 1
    clock.now += RESERVING_S
    for _ in range(3):
        placed.request_agents(2)
    assert len(ray.bound) == 2
    ray.capacity["3"] = {"CPU": 8.0}
    for _ in range(3):
        placed.request_agents(2)
    assert where(placed) == ["0", "3"]


def test_who_has_all_agents_again_has_no_ticket(ray: FakeRay, clock: Time) -> None:
    """Nobody would look for what it is granted."""
    ray.capacity = {"0": {"CPU": 2.0}}
    placed = placement(ray, clock, nodes=1)
    placed.request_agents(1)
    placed.forget(placed.agents()[0])
    placed.request_agents(1)
    assert any("-ticket-" in group for group in ray.groups)
    clock.now += RESTART_AGENT_AFTER_S
    placed.request_agents(1)
    assert where(placed) == ["0"]
    assert not any("-ticket-" in group for group in ray.groups)


def test_a_gang_that_was_lost_whole_is_reserved_at_once_or_not_at_all(ray: FakeRay, clock: Time) -> None:
    """Two such runs would take half of the nodes each."""
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    lose(ray, placed, ["0", "1", "2"])
    del ray.capacity["3"]
    for number in (7, 8, 9):
        assert where(placed) == []
        assert not any(bundle.node for bundle in ray.bundles(""))
        ray.capacity[str(number)] = {"CPU": 2.0}
    for _ in range(3):
        placed.request_agents(3)
    assert where(placed) == ["7", "8", "9"]
    assert len(ray.groups) == 1


def test_what_is_asked_of_the_queue_follows_the_nodes(ray: FakeRay, clock: Time) -> None:
    """One node with a GPU does not make the run wait for four of them."""
    ray.capacity = {"g": {"CPU": 8.0, "GPU": 1.0}} | {str(n): {"CPU": 8.0} for n in range(3)}
    placed = placement(ray, clock, nodes=4, slots=4)
    placed.request_agents(4)
    assert [wanted for wanted, _ in next(iter(ray.groups.values()))] == [{"CPU": 4.0}] * 4
    ray.capacity["3"] = {"CPU": 8.0}
    for _ in range(3):
        placed.request_agents(4)
    assert where(placed) == ["0", "1", "2", "3"]


def test_a_successor_that_needs_fewer_nodes_leaves_the_place_of_its_predecessor(ray: FakeRay, clock: Time) -> None:
    del ray.capacity["3"], ray.capacity["2"]
    placement(ray, clock, nodes=4).request_agents(4)
    successor = placement(ray, clock, nodes=2)
    for _ in range(2):
        successor.request_agents(2)
    assert where(successor) == ["0", "1"]
    assert len(ray.groups) == 1


def test_a_node_that_joins_while_we_look_completes_the_queue(ray: FakeRay, clock: Time) -> None:
    """What is granted names a node that we have not seen yet: it is kept until we have."""
    del ray.capacity["3"], ray.capacity["2"]
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    (ticket,) = ray.groups
    before = ray.nodes()
    ray.capacity["7"] = {"CPU": 2.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "nodes", lambda: before)
        placed.request_agents(3)
    assert list(ray.groups) == [ticket]
    for _ in range(2):
        placed.request_agents(3)
    assert where(placed) == ["0", "1", "7"]


def test_a_place_that_was_granted_and_lost_is_given_back_so_that_ray_does_not_look_for_another(
    ray: FakeRay, clock: Time
) -> None:
    ray.capacity = {}
    placed = placement(ray, clock, nodes=1)
    placed.request_agents(1)
    (ticket,) = ray.groups
    ray.capacity["0"] = {"CPU": 2.0}
    ray.bundles("")
    del ray.capacity["0"]
    placed.request_agents(1)
    assert ticket not in ray.groups
    placed.request_agents(1)
    assert len(ray.groups) == 1


def test_a_node_that_dies_before_it_is_given_is_waited_for_no_longer(ray: FakeRay, clock: Time) -> None:
    ray.refuses = {"3"}
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(4)
    placed.request_agents(4)
    assert ["3"] in ray.bound.values()
    del ray.capacity["3"]
    ray.capacity["4"] = {"CPU": 2.0}
    placed.request_agents(4)
    assert where(placed) == ["0", "1", "2", "4"]


def test_two_lost_nodes_are_replaced_by_two_and_none_is_asked_for_twice(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock, nodes=4)
    placed.request_agents(4)
    lose(ray, placed, ["0", "1"])
    ray.capacity["7"] = {"CPU": 2.0}
    ray.refuses = {"7"}
    for _ in range(2):
        placed.request_agents(4)
    assert list(ray.bound.values()).count(["7"]) == 1
    ray.capacity["8"] = {"CPU": 2.0}
    ray.refuses = set()
    for _ in range(2):
        placed.request_agents(4)
    assert where(placed) == ["2", "3", "7", "8"]


def test_what_a_predecessor_left_in_the_queue_is_given_back(ray: FakeRay, clock: Time) -> None:
    """It was killed between reserving the gang and leaving the queue."""
    prefix = f"phalanx-{run_key(ray.paths.root)}-"
    ray.reserve(f"{prefix}gang-1", [{"CPU": 2.0}] * 3, ["0", "1", "2"])
    ray.reserve(f"{prefix}ticket-1", [{"CPU": 2.0}] * 2)
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    assert list(ray.groups) == [f"{prefix}gang-1"]
    assert where(placed) == ["0", "1", "2"]


def test_every_bundle_is_bound_to_its_node_so_that_ray_does_not_look_for_another(ray: FakeRay, clock: Time) -> None:
    """Where there is none free Ray would look without a pause, with a whole processor of the head."""
    placed = placement(ray, clock, nodes=2)
    placed.request_agents(3)
    assert {group: ray.bound[group] for group in ray.groups} == {
        group: [where for _, where in bundles] for group, bundles in ray.groups.items()
    }
    lose(ray, placed, ["0"])
    placed.request_agents(3)
    assert where(placed) == ["1", "2", "3"]
    assert [bundle.node for bundle in ray.bundles("") if "gang" in bundle.group] == ["", "1"]


def test_when_all_of_the_gang_is_lost_at_once_its_group_is_given_back(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock, nodes=2)
    placed.request_agents(2)
    lose(ray, placed, ["0", "1"])
    clock.now += RESERVING_S
    placed.request_agents(2)
    assert where(placed) == ["2", "3"]
    assert len(ray.groups) == 1


def test_a_node_whose_gpus_are_taken_is_not_free_for_its_processors(ray: FakeRay, clock: Time) -> None:
    ray.capacity = {str(n): {"CPU": 96.0, "GPU": 8.0} for n in range(2)}
    ray.reserve("of somebody else", [{"GPU": 8.0}], ["1"])
    placed = placement(ray, clock, nodes=2, slots=8)
    placed.request_agents(2)
    clock.now += RESERVING_S
    assert where(placed) == []
    assert "the cluster has 1 node with >= 8 free GPUs" in placed.why_missing()


def test_nodes_are_whole(ray: FakeRay, clock: Time) -> None:
    ray.capacity = {"0": {"CPU": 64.0}, "1": {"CPU": 64.0}, "2": {"CPU": 1.0}}
    placed = placement(ray, clock, nodes=2, slots=2)
    placed.request_agents(2)
    assert [wanted for wanted, _ in ray.groups.popitem()[1]] == [{"CPU": 64.0}, {"CPU": 64.0}]
    assert [(node.node, node.slots) for node in placed.nodes()] == [("0", 2), ("1", 2), ("2", 1)]


def test_gpus_are_the_slots_where_there_are_any(ray: FakeRay, clock: Time) -> None:
    ray.capacity = {"0": {"CPU": 96.0, "GPU": 8.0}, "1": {"CPU": 96.0, "GPU": 8.0}, "2": {"memory": 1.0}}
    placed = placement(ray, clock, nodes=2, slots=8)
    placed.request_agents(3)
    assert [wanted for wanted, _ in ray.groups.popitem()[1]] == [{"CPU": 96.0, "GPU": 8.0}] * 2
    assert {agent.slots for agent in placed.agents()} == {8}
    clock.now += RESERVING_S
    assert ">= 8 free GPUs" in placed.why_missing()
    assert device_count({"CPU": 96.0, "GPU": 8.0}) == 8
    assert device_count({"memory": 1.0}) == 0


def test_a_lost_node_is_replaced_by_a_free_one(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    lost = placed.agents()[1]
    del ray.capacity[lost.node]
    placed.forget(lost)
    placed.request_agents(3)
    assert where(placed) == ["0", "2", "3"]


def test_a_node_that_only_we_have_lost_is_replaced_before_ray_notices(ray: FakeRay, clock: Time) -> None:
    """A cut cable: Ray takes it for alive for another minute."""
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    ray.obedient = False
    placed.forget(placed.agents()[1])
    placed.request_agents(3)
    assert where(placed) == ["0", "2", "3"]
    clock.now += 60.0
    placed.request_agents(3)
    assert ray.killed == [f"phalanx-{run_key(ray.paths.root)}-agent-1"]
    assert where(placed) == ["0", "2", "3"]


def test_an_agent_that_died_is_started_on_its_node_if_there_is_no_other(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock, nodes=4)
    placed.request_agents(4)
    placed.forget(placed.agents()[1])
    placed.request_agents(4)
    assert where(placed) == ["0", "2", "3"]
    clock.now += RESTART_AGENT_AFTER_S
    placed.request_agents(4)
    assert where(placed) == ["0", "1", "2", "3"]
    assert clock.now < 100.0 + SHUN_S


def test_never_more_agents_than_wanted(ray: FakeRay, clock: Time) -> None:
    """A node that was forgotten is as good as any after a while: its agent would be one too many."""
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    placed.forget(placed.agents()[1])
    placed.request_agents(3)
    assert where(placed) == ["0", "2", "3"]
    clock.now += SHUN_S
    placed.request_agents(3)
    assert len(ray.bundles("")) == 4
    assert where(placed) == ["0", "2", "3"]
    placed.forget(placed.agents()[0])
    placed.request_agents(3)
    assert where(placed) == ["1", "2", "3"]


def test_an_agent_that_ends_at_once_is_not_started_over_and_over(ray: FakeRay, clock: Time) -> None:
    ray.broken = {"1"}
    placed = placement(ray, clock, nodes=2)
    for _ in range(5):
        placed.request_agents(2)
    assert ray.started.count("1") == 1
    assert placed.why_missing() == "the agent on 10.0.0.1 ended: no such luck"
    clock.now += RESTART_AGENT_AFTER_S
    ray.broken = set()
    placed.request_agents(2)
    assert where(placed) == ["0", "1"]


def test_a_spare_that_somebody_else_took_is_asked_for_again(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock, nodes=3)
    placed.request_agents(3)
    ray.refuses = {"3"}
    placed.request_agents(4)
    placed.request_agents(4)
    assert len(ray.groups) == 2
    clock.now += RESERVING_S
    placed.request_agents(4)
    assert len(ray.groups) == 1
    clock.now += REFUSED_S
    ray.refuses = set()
    placed.request_agents(4)
    assert len(ray.groups) == 2
    assert where(placed) == ["0", "1", "2", "3"]


def test_a_successor_finds_what_its_predecessor_reserved(ray: FakeRay, clock: Time) -> None:
    placement(ray, clock).request_agents(3)
    successor = placement(ray, clock)
    assert where(successor) == ["0", "1", "2"]
    successor.request_agents(3)
    assert len(ray.started) == 3
    assert len(ray.groups) == 1


def test_an_announcement_without_an_actor_is_no_agent(ray: FakeRay, clock: Time) -> None:
    stale = AgentAddress(node="0", host="10.0.0.0", port=1, pid=1, slots=2, incarnation="old")
    announce.write(ray.paths, stale)
    placed = placement(ray, clock)
    assert placed.agents() == []
    announce.write(ray.paths, replace(stale, node="gone"))
    assert placed.agents() == []


def test_release_tells_agents_to_leave_and_kills_those_that_do_not(ray: FakeRay, clock: Time) -> None:
    placed = placement(ray, clock)
    placed.request_agents(3)
    ray.obedient = False
    placed.release()
    assert len(ray.stopped) == 3
    assert len(ray.killed) == 3
    assert ray.groups == {}
    assert announce.read_all(ray.paths) == []
    placed.release()
    assert placed.agents() == []


def test_runs_of_the_same_name_share_nothing(tmp_path: Path) -> None:
    assert run_key(tmp_path / "a" / "run") != run_key(tmp_path / "b" / "run")
