"""Who forms the gang, in which order: neighbours in the address plan are neighbours there, and places are kept."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jobs.checkpoint.memory import Address
from launcher.backend import AgentAddress
from launcher.host.persist.service import other_node
from launcher.lineup import form, line_up
from launcher.progress import ResumePoint
from launcher.run import Run
from tests.support.fakes import tiny_request


@pytest.mark.parametrize(
    "addresses",
    [
        ["10.0.0.9", "10.0.0.10", "10.0.0.100", "10.0.1.2"],
        ["fd00::9", "fd00::a", "fd00::10", "fd00::1:0"],
        ["rack1-n9", "rack1-n10", "rack2-n1", "rack10-n1"],
        ["10.0.0.9", "192.168.0.1", "fd00::1", "head"],
    ],
)
def test_the_first_gang_stands_in_the_order_of_addresses(addresses: list[str]) -> None:
    """Whatever the nodes are called, and whoever has come first."""
    for seed in range(20):
        dice = random.Random(seed)
        up = {f"{dice.getrandbits(128):032x}": address for address in dice.sample(addresses, len(addresses))}
        assert [up[node] for node in line_up([], up, 4)] == addresses
        assert [up[node] for node in line_up([], up, 3)] == addresses[:3], "the spare is the last one"


def test_nodes_of_one_address_stand_in_the_order_of_their_names() -> None:
    up = dict.fromkeys(["n10", "n9", "n1"], "127.0.0.1")
    assert line_up([], up, 3) == ["n1", "n9", "n10"]


def test_who_was_there_keeps_its_place_and_a_spare_takes_that_of_the_fallen_one() -> None:
    up = {"a": "10.0.0.3", "c": "10.0.0.1", "d": "10.0.0.9", "e": "10.0.0.10"}
    assert line_up(["a", "b", "c"], up, 3) == ["a", "d", "c"]
    assert line_up(["a", "b", "f", "c"], up, 4) == ["a", "d", "e", "c"]
    assert line_up(["c", "a"], up, 4) == ["c", "a", "d", "e"], "nodes that come back stand behind"
    assert line_up(["b", "c", "a"], {"c": "10.0.0.1", "a": "10.0.0.3"}, 2) == ["a", "c"], "one that shrinks"
    assert line_up(["b", "c", "a"], up, 2) == ["d", "c"], "one that stood by rather than one that must move"


@pytest.mark.parametrize(("racks", "size"), [(2, 4), (4, 4), (5, 8)])
def test_no_rack_takes_a_node_and_its_replica(racks: int, size: int) -> None:
    """Ray's names of nodes are random: in their order, some node would have its replica in its own rack."""
    dice = random.Random(racks)
    up = {f"{dice.getrandbits(224):056x}": f"10.1.{rack}.{n + 1}" for rack in range(racks) for n in range(size)}

    def together(gang: list[str]) -> int:
        peers = [Address(host=up[node], port=1, incarnation=node) for node in gang]
        pairs = [(own.host, replica.host) for own in peers if (replica := other_node(own, peers))]
        assert len(pairs) == len(gang)
        return sum(one.rsplit(".", 1)[0] == other.rsplit(".", 1)[0] for one, other in pairs)

    assert together(line_up([], up, len(up))) == 0
    assert together(sorted(up)) > 0


def test_the_gang_of_an_attempt_goes_by_where_its_agents_are(tmp_path: Path) -> None:
    request = tiny_request(tmp_path)
    up = {
        node: AgentAddress(node=node, host=host, port=1, pid=1, slots=2, incarnation="i")
        for node, host in (("a", "10.0.0.10"), ("b", "10.0.0.9"), ("c", "10.0.0.8"))
    }
    point = ResumePoint(path="", step=0)
    state = form(Run(), request.job.plan, up, request.cluster, point=point, script=False)
    assert list(state.placement) == ["c", "b"]
