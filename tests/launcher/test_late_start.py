"""Ranks that do not come to their first step: asked where they stand, the one that they wait for is named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher.hang import Standing, late_at_the_start
from launcher.host.beside import Beside
from launcher.host.logs import RankLogs
from launcher.host.stacks import ANSWER_S, Stacks
from launcher.phase import Phase
from launcher.run import EventKind
from launcher.store import read_json
from tests.launcher.test_hang import stack
from tests.support.stage import Stage

MEETING = stack("distributed.py:connect", "torch/distributed/distributed_c10d.py:init_process_group")
MOUNTING = stack("sample.py:open", "os.py:stat")
LIMIT_S = 60.0


def standings(*stacks: str, state: str = "S") -> dict[int, Standing]:
    return {rank: Standing(step=0, state=state, stack=text) for rank, text in enumerate(stacks)}


def test_the_one_that_is_not_where_the_others_wait() -> None:
    rank, why = late_at_the_start(standings(MEETING, MOUNTING, MEETING))
    assert rank == 1
    assert "does not come to where the others wait: it is in stat (os.py)" in why


@pytest.mark.parametrize(
    "found",
    [
        standings(MEETING, MEETING),
        standings(MOUNTING, MOUNTING, MEETING),
        standings(MOUNTING),
        standings(MOUNTING, "", ""),
    ],
)
def test_nobody_is_named_in_doubt(found: dict[int, Standing]) -> None:
    assert late_at_the_start(found)[0] == -1


def test_one_that_was_stopped() -> None:
    found = standings(MEETING, MEETING) | {2: Standing(step=0, state="T")}
    assert late_at_the_start(found) == (2, "is stopped by a signal")


def test_a_process_that_does_not_take_the_signal_yet_is_not_killed_by_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            stacks = Stacks(RankLogs(RunPaths(tmp_path), "n0", Beside(), parent=str(tmp_path)))
            stacks.ask([(3, process.pid, log)], 0.0)
            (told,) = stacks.collect(ANSWER_S)
            assert (told["rank"], told["state"], told["stack"], process.poll()) == (3, "S", "", None)
        finally:
            process.kill()


def late(stage: Stage, stacks: dict[int, str]) -> None:
    """The attempt does not begin; its ranks say where they stand, as far as they do."""
    stage.turn(2)
    _, attempt, placement = [call for call in stage.gang.calls if call[0] == "spawn"][-1]
    for node, ranks in placement.items():
        stage.gang.say("spawned", node, attempt=attempt, ranks=[{"rank": r, "pid": 100 + r} for r in ranks])
    stage.turn()
    stage.clock.now += LIMIT_S - 1.6
    stage.turn()
    assert stage.gang.calls[-1] == ("dump", attempt)
    for node, ranks in placement.items():
        for rank in sorted(stacks.keys() & set(ranks)):
            stage.gang.say("stack", node, attempt=attempt, rank=rank, state="S", stack=stacks[rank])
    stage.turn()
    assert stage.controller.phase is Phase.RUN, "the time is not over"
    stage.clock.now += 1.0 if len(stacks) == 4 else 4.0
    stage.turn()
    for node in placement:
        stage.gang.say("killed", node, attempt=attempt)
    stage.turn()


def test_a_node_that_is_waited_for_in_vain_makes_room_for_the_spare(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start_timeout_s=LIMIT_S, backoff_s=0.0)
    late(stage, {0: MEETING, 1: MEETING, 2: MOUNTING, 3: MEETING})
    run = stage.store.run()
    (fall,) = run.failures
    assert (fall.kind, fall.node) == ("start_timeout", "b")
    told = next(event.data for event in stage.store.events() if event.kind is EventKind.FAILURE_DETECTED)
    assert "no first step within 60 s (recovery.start_timeout_s): rank 2 on b (pipe" in told["failure"]["detail"]
    assert set(run.excluded) == {"b"}
    ranks = read_json(stage.store.paths.hang(1))["ranks"]
    assert all(ranks[str(rank)]["stack"] for rank in range(4))
    stage.turn(2)
    assert [call[2] for call in stage.gang.calls if call[0] == "spawn"][-1] == {"a": [0, 1], "c": [2, 3]}


@pytest.mark.parametrize("silent", [{2}, {2, 3}])
def test_the_node_of_ranks_that_say_nothing(tmp_path: Path, silent: set[int]) -> None:
    """Its pool never becomes ready, say."""
    stage = Stage(tmp_path, start_timeout_s=LIMIT_S, backoff_s=0.0)
    late(stage, {rank: MEETING for rank in range(4) if rank not in silent})
    run = stage.store.run()
    assert [(fall.kind, fall.node) for fall in run.failures] == [("start_timeout", "b")]
    assert set(run.excluded) == {"b"}


def test_where_nobody_can_be_named_no_node_is_left_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start_timeout_s=LIMIT_S, backoff_s=0.0)
    late(stage, dict.fromkeys(range(4), MEETING))
    run = stage.store.run()
    assert [(fall.kind, fall.node) for fall in run.failures] == [("start_timeout", "")]
    assert run.excluded == {}


def test_the_first_step_in_time_ends_the_watch(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start_timeout_s=LIMIT_S)
    stage.turn(2)
    stage.clock.now += LIMIT_S - 5.0
    stage.start()
    assert not stage.controller.hangs.starting
    stage.clock.now += 10.0
    stage.turn()
    assert ("dump", 1) not in stage.gang.calls


def test_what_is_not_heard_is_waited_for_in_every_phase(tmp_path: Path) -> None:
    stage = Stage(tmp_path, backoff_s=0.0)
    stage.gang.in_doubt = True
    stage.turn(5)
    assert not any(call[0] == "spawn" for call in stage.gang.calls), "nobody is there to order ranks from"
    stage.gang.in_doubt = False
    stage.start()
    stage.gang.say("exit", "a", attempt=1, rank=0, pid=100, code=1, signal=0)
    stage.turn()
    assert stage.controller.phase is Phase.STOP
    stage.gang.in_doubt = True
    stage.gang.say("cut_off", "", patience_s=60.0)
    for _ in range(20):
        stage.clock.now += 2.0
        stage.turn()
    assert stage.controller.phase is Phase.STOP
    assert not any(call[0] == "drop" for call in stage.gang.calls)
    assert EventKind.CUT_OFF in stage.kinds()
    stage.gang.in_doubt = False
    for _ in range(20):
        stage.clock.now += 2.0
        stage.turn()
    assert any(call[0] == "drop" for call in stage.gang.calls), "not for ever"
