"""A node that the run itself leaves out: nobody waits for it, people are told, and it carries ranks again in time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.backend import NodeInfo
from launcher.phase import Phase
from launcher.run import EventKind
from strategies.errors import ClusterError
from tests.launcher.test_devices import fail, start_ranks
from tests.launcher.test_origin import killed
from tests.launcher.test_sizing import decisions, leave
from tests.support.checkpoints import write_checkpoint
from tests.support.fakes import FakeBackend
from tests.support.stage import Stage

OUT_S = 14400.0


class Small(FakeBackend):
    """A backend that says what it was asked for, and may have one more node, on which no agent is up."""

    more: NodeInfo | None = None
    silent = False
    wanted = 0

    def request_agents(self, count: int) -> None:
        self.wanted = count

    def nodes(self) -> list[NodeInfo]:
        if self.silent:
            raise ClusterError("no answer")
        return [*super().nodes(), *([self.more] if self.more else [])]

    def why_missing(self) -> str:
        return f"{self.wanted} agents are wanted, {len(self.alive)} nodes are left"


def stage_of(root: Path, nodes: str = "ab", **recovery: Any) -> Stage:
    """A run of two nodes by whose clock its log is written."""
    stage = Stage(root, nodes=tuple(nodes), spares=len(nodes) - 2, backoff_s=0.0, **recovery)
    stage.clock.now = stage.store.events()[-1].time
    stage.store._wall = stage.clock.time
    small = Small(tuple(nodes))
    stage.backend = small
    stage.lock.release()
    stage.renew()
    return stage


def leave_b_out(stage: Stage, times: int = 2) -> None:
    """Its device is gone, so often that it carries no ranks any more."""
    for _ in range(times):
        attempt, nodes = start_ranks(stage, train=True)
        fail(stage, attempt, nodes, "b", "RuntimeError", "No CUDA GPUs are available")
    assert list(stage.store.run().excluded) == ["b"]


def actions(stage: Stage) -> list[str]:
    return [action for action, _ in decisions(stage)]


def test_a_node_that_is_left_out_is_not_waited_for(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    leave_b_out(stage)
    stage.turn(2)
    assert stage.store.run().attempts[-1].nodes == ("a",)
    assert actions(stage) == ["restart", "restart", "shrink"]
    assert EventKind.WAITING_FOR_NODES not in stage.kinds()
    assert (
        "1 of 2 nodes are there after 0 s: no ranks are placed on b (for another 4.00 h), by recovery.exclude_for_s, "
        "so 1 more is asked for: 3 agents are wanted, 2 nodes are left; going on as " in decisions(stage)[-1][1]
    )
    assert decisions(stage)[-1][1].endswith("; there is no other node to wait for")


@pytest.mark.parametrize(
    ("slots", "alive", "waits"),
    [(2, True, True), (1, True, False), (2, False, False)],
    ids=["another", "too small", "dead"],
)
def test_another_node_is_waited_for(slots: int, alive: bool, waits: bool, tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    assert isinstance(stage.backend, Small)
    stage.backend.more = NodeInfo(node="d", address="127.0.0.1", slots=slots, alive=alive)
    leave_b_out(stage)
    stage.turn(30)
    assert (stage.controller.phase is Phase.GATHER) is waits
    assert ("wait" in actions(stage)) is waits
    if waits:
        (waiting,) = [e.data["why"] for e in stage.store.events() if e.kind is EventKind.WAITING_FOR_NODES]
        assert waiting.startswith("no ranks are placed on b (for another 4.00 h), by recovery.exclude_for_s, so 1 more")
        stage.backend.alive["d"] = "d-0"
        stage.turn(4)
        assert stage.store.run().attempts[-1].nodes == ("a", "d")


def test_a_cluster_that_does_not_say_is_waited_for(tmp_path: Path) -> None:
    stage = stage_of(tmp_path)
    assert isinstance(stage.backend, Small)
    stage.backend.silent = True
    leave_b_out(stage)
    stage.turn(30)
    assert actions(stage) == ["restart", "restart", "wait"]


@pytest.mark.parametrize("lives", [False, True])
def test_that_its_agent_is_gone_as_well_changes_nothing(lives: bool, tmp_path: Path) -> None:
    """Whether it comes up again or not, where the cluster still has the node: no ranks are placed there."""
    stage = stage_of(tmp_path)
    assert isinstance(stage.backend, Small)
    stage.backend.silent = True
    leave_b_out(stage)
    stage.backend.alive.pop("b")
    stage.gang.say("agent_lost", "b", why="silent")
    stage.turn(2)
    assert stage.controller.phase is Phase.GATHER
    stage.backend.silent = False
    stage.backend.more = NodeInfo(node="b", address="127.0.0.1", slots=2) if lives else None
    stage.turn(2)
    assert stage.store.run().attempts[-1].nodes == ("a",)
    words = decisions(stage)[-1][1]
    assert "no ranks are placed on b (for another 4.00 h), by recovery.exclude_for_s; 2 agents are wanted" in words


def test_who_may_come_back_is_waited_for(tmp_path: Path) -> None:
    """Of three nodes one is left out, and the spare in its place is lost."""
    stage = stage_of(tmp_path, "abc")
    leave_b_out(stage, times=1)
    stage.start()
    stage.backend.alive.pop("c")
    stage.gang.say("agent_lost", "c", why="silent")
    killed(stage, "a", attempt=2)
    stage.turn(30)
    assert stage.controller.phase is Phase.GATHER
    assert actions(stage)[-1] == "wait"


def test_when_its_time_is_over_a_spare_again_takes_a_place(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "abc", exclude_for_s=100.0)
    leave_b_out(stage, times=1)
    stage.start()
    assert stage.store.run().attempts[-1].nodes == ("a", "c")
    for attempt, after_s, nodes in ((2, 50.0, ("a", "c")), (3, 60.0, ("a", "b"))):
        stage.clock.now += after_s
        if after_s == 60.0:
            stage.backend.alive.pop("c")
            stage.gang.say("agent_lost", "c", why="silent")
            killed(stage, "a", attempt=attempt)
        else:
            stage.gang.say("exit", "a", rank=1, attempt=attempt, code=None, signal=9)
            killed(stage, "a", "c", attempt=attempt)
        stage.turn(2)
        stage.start()
        assert stage.store.run().attempts[-1].nodes == nodes
    assert EventKind.NODE_READMITTED not in stage.kinds(), "it is not taken back: it is as good as any"


def test_when_its_time_is_over_the_run_grows_back(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, exclude_for_s=100.0)
    leave_b_out(stage)
    stage.start()
    stage.clock.now += 70.0
    stage.turn(5)
    assert actions(stage)[-1] == "shrink"
    stage.clock.now += 40.0
    stage.turn(2)
    assert actions(stage)[-1] == "grow"
    write_checkpoint(stage.store.paths.checkpoint_dir, 5, (2, 3))
    leave(stage, 3, 5)
    stage.start()
    last = stage.store.run().attempts[-1]
    assert (last.nodes, last.reason, last.first_step) == (("a", "b"), "grow", 6)
