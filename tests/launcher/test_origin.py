"""Where a gang begins when checkpoints are gone, cut short or damaged: never again at step 1 without a person."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint.layout import place_of
from jobs.checkpoint.memory import Holding
from jobs.spec import CheckpointSpec
from launcher import adoption, origin, progress, recovery
from launcher.memory_tier import SILENT_S
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from launcher.store import dump
from tests.support.checkpoints import write_checkpoint
from tests.support.stage import Stage

STEPS = (5, 10)


def trained(root: Path, **options: Any) -> tuple[Stage, list[Path]]:
    """A gang that has committed the checkpoints of :data:`STEPS`."""
    stage = Stage(root, **{"backoff_s": 0.0, "shrink_after_s": 0.0, **options})
    stage.start()
    found = [write_checkpoint(stage.store.paths.checkpoint_dir, step) for step in STEPS]
    for step, path in zip(STEPS, found, strict=True):
        stage.report("a", "checkpoint", 1, rank=0, step=step, path=str(path), bytes=1, stall_s=0.1)
    stage.report("a", "step", 1, rank=0, step=12)
    stage.turn()
    return stage, found


def rejections(stage: Stage) -> list[str]:
    return [e.data["path"] for e in stage.store.events() if e.kind is EventKind.CHECKPOINT_REJECTED]


def killed(stage: Stage, *nodes: str, attempt: int = 1) -> None:
    for node in nodes:
        stage.gang.say("killed", node, attempt=attempt)


# --- how the gang ends --------------------------------------------------------------------------------------------


def a_rank_falls(stage: Stage) -> None:
    stage.gang.say("exit", "b", rank=3, attempt=1, code=None, signal=9)
    killed(stage, "a", "b")
    stage.turn(4)


def a_node_is_lost(stage: Stage) -> None:
    """The spare takes its place or, where there is none, the plan shrinks."""
    stage.backend.alive.pop("b")
    stage.gang.say("agent_lost", "b", why="silent")
    killed(stage, "a")
    stage.turn(4)


def the_controller_falls_too(stage: Stage) -> None:
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    stage.turn(4)


def a_node_goes_with_notice(stage: Stage) -> None:
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    for rank in range(4):
        stage.gang.say("exit", "ab"[rank // 2], rank=rank, attempt=1, code=0, signal=None)
    stage.turn()
    killed(stage, "a", "b")
    stage.turn(4)


# --- what becomes of the checkpoints ------------------------------------------------------------------------------


def the_mount_is_gone(folder: Path) -> None:
    shutil.move(folder, folder.with_name("elsewhere"))
    folder.mkdir()


def the_mount_is_back(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.move(folder.with_name("elsewhere"), folder)


def shards_are_gone(folder: Path) -> None:
    for shard in folder.rglob("shard-00001.safetensors"):
        shutil.move(shard, shard.with_name("elsewhere"))


def shards_are_back(folder: Path) -> None:
    for shard in folder.rglob("elsewhere"):
        shutil.move(shard, shard.with_name("shard-00001.safetensors"))


ENDS: tuple[Callable[[Stage], None], ...] = (
    a_rank_falls,
    a_node_is_lost,
    the_controller_falls_too,
    a_node_goes_with_notice,
)
LOSSES = ((the_mount_is_gone, the_mount_is_back), (shards_are_gone, shards_are_back))


@pytest.mark.parametrize("nodes", ["ab", "abc"])
@pytest.mark.parametrize(("lose", "bring_back"), LOSSES)
@pytest.mark.parametrize("end", ENDS)
def test_it_ends_with_the_reason_and_a_resume_goes_on_from_the_newest(
    end: Callable[[Stage], None],
    lose: Callable[[Path], None],
    bring_back: Callable[[Path], None],
    nodes: str,
    tmp_path: Path,
) -> None:
    stage, found = trained(tmp_path, nodes=tuple(nodes), spares=len(nodes) - 2)
    folder = stage.store.paths.checkpoint_dir
    lose(folder)
    end(stage)
    given_up(stage)
    run = stage.store.run()
    assert (run.state, len(run.attempts)) == (RunState.FAILED, 1)
    assert run.reason.startswith("step 10 was committed, and no checkpoint can be used: ")
    assert ("is missing" if lose is shards_are_gone else f"there is none in {folder}") in run.reason
    assert f"phalanx resume {stage.store.name}" in run.reason
    assert rejections(stage) == []
    assert stage.backend.released == 1
    bring_back(folder)
    resumed(stage)
    attempt = stage.store.run().attempts[-1]
    assert (attempt.resume_from, attempt.first_step, attempt.reason) == (str(found[-1]), 11, "resume")


def given_up(stage: Stage) -> None:
    """It waits first, and says so once: what the storage has may come back by itself."""
    assert stage.state() is RunState.RECOVERING
    waits = [e.data["reason"] for e in stage.store.events() if e.data.get("action") == "wait"]
    assert len(waits) == 1
    stage.clock.now += stage.request.recovery.wait_for_nodes_s
    stage.turn()
    assert stage.store.run().reason == waits[0]


@pytest.mark.parametrize(("lose", "bring_back"), LOSSES)
def test_what_comes_back_in_time_is_gone_on_from(
    lose: Callable[[Path], None], bring_back: Callable[[Path], None], tmp_path: Path
) -> None:
    stage, found = trained(tmp_path)
    lose(stage.store.paths.checkpoint_dir)
    a_rank_falls(stage)
    assert stage.state() is RunState.RECOVERING
    bring_back(stage.store.paths.checkpoint_dir)
    stage.start()
    attempt = stage.store.run().attempts[-1]
    assert (attempt.resume_from, attempt.first_step, attempt.reason) == (str(found[-1]), 11, "restart")
    assert rejections(stage) == []


def resumed(stage: Stage) -> None:
    """A person resumes the run, on two nodes that are there again."""
    stage.backend.alive = {"a": "a-1", "b": "b-1", "c": "c-1"}
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    stage.start()


def test_what_is_known_to_have_been_is_enough(tmp_path: Path) -> None:
    """The ranks died before they could report the commit, and the next attempt has gone on from it."""
    stage = Stage(tmp_path, backoff_s=0.0)
    write_checkpoint(stage.store.paths.checkpoint_dir, 5)
    stage.start()
    assert (stage.store.run().committed_step, origin.promised(stage.store.run())) == (5, 5)
    the_mount_is_gone(stage.store.paths.checkpoint_dir)
    a_rank_falls(stage)
    given_up(stage)
    assert "step 5 was committed" in stage.store.run().reason


def test_before_the_first_checkpoint_it_begins_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, backoff_s=0.0)
    stage.start()
    stage.report("a", "step", 1, rank=0, step=3)
    a_rank_falls(stage)
    stage.start()
    assert stage.store.run().attempts[-1].first_step == 1


def test_what_lacks_a_file_is_passed_over_until_a_person_resumes(tmp_path: Path) -> None:
    stage, (older, newer) = trained(tmp_path, max_restarts=1)
    shard = place_of(newer).shard(0)
    shutil.move(shard, tmp_path / "kept")
    a_rank_falls(stage)
    stage.start()
    assert rejections(stage) == [str(newer)]
    assert stage.store.run().attempts[-1].resume_from == str(older)
    shutil.move(tmp_path / "kept", shard)
    assert stage.store.run().rejected == {str(newer)}, "the run has gone on from another one"
    stage.gang.say("exit", "b", rank=3, attempt=2, code=None, signal=9)
    killed(stage, "a", "b", attempt=2)
    stage.turn(4)
    assert "all 1 restarts are used" in stage.store.run().reason
    resumed(stage)
    assert stage.store.run().attempts[-1].resume_from == str(newer)
    assert stage.store.run().rejected == frozenset()


def test_what_was_read_and_is_damaged_stays_so(tmp_path: Path) -> None:
    stage, (older, newer) = trained(tmp_path, max_restarts=0)
    stage.report("b", "rejected", 1, rank=3, path=str(newer), reason="block 0 does not match its digest")
    killed(stage, "a", "b")
    stage.turn(4)
    assert stage.state() is RunState.FAILED
    assert origin.newest(stage.store.paths, rejected=stage.store.run().found_damaged, script=False) == (
        progress.ResumePoint(path=str(older), step=5),
        {},
    )
    resumed(stage)
    assert stage.store.run().attempts[-1].resume_from == str(older)
    assert stage.store.run().rejected == {str(newer)}


def test_the_checkpoints_of_another_run_are_not_gone_on_from(tmp_path: Path) -> None:
    stage, _ = trained(tmp_path)
    shared = tmp_path / "shared"
    shutil.move(stage.store.paths.checkpoint_dir, shared)
    stage.store.paths.pointer.write_text(f"{shared}\n")
    (shared / "run.json").write_bytes(dump({"run": "run", "owner": "somebody else"}))
    a_rank_falls(stage)
    given_up(stage)
    run = stage.store.run()
    assert run.state is RunState.FAILED
    assert "holds the checkpoints of another run" in run.reason


# --- memory -------------------------------------------------------------------------------------------------------


def hold(stage: Stage, monkeypatch: pytest.MonkeyPatch, *, step: int, attempt: int, epoch: int = 1) -> None:
    """Node a holds every part of a generation."""
    parts = [
        Holding(step=step, epoch=epoch, attempt=attempt, rank=rank, world=4, bytes=4, own=True).told()
        for rank in range(4)
    ]
    address = {"host": "127.0.0.1", "port": 1, "incarnation": "i"}

    def ask_holdings(number: int) -> set[str]:
        stage.gang.say("holdings", "a", id=number, held=parts, address=address)
        return {"a"}

    monkeypatch.setattr(stage.gang, "ask_holdings", ask_holdings)


def held_by(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, *, step: int, ranks: dict[str, range], newest: int = 0
) -> Callable[[str], None]:
    """Nodes a and b are asked and hold the parts of these ranks; returns what makes one of them answer.

    And of the ``newest`` step, that of its first rank.
    """
    job = replace(stage.request.job, checkpoint=CheckpointSpec(every=5, memory_every=1))
    stage.controller.request = replace(stage.request, job=job)
    asked: list[int] = []

    def ask_holdings(number: int) -> set[str]:
        asked.append(number)
        return {"a", "b"}

    def answer(node: str) -> None:
        parts = [
            Holding(step=step, epoch=1, attempt=1, rank=rank, world=4, bytes=4, own=True).told()
            for rank in ranks.get(node, ())
        ]
        if newest:
            parts.append(Holding(step=newest, epoch=1, attempt=1, rank=0, world=4, bytes=4, own=True).told())
        address = {"host": "127.0.0.1", "port": 1, "incarnation": "i"}
        stage.gang.say("holdings", node, id=asked[-1], held=parts, address=address)

    monkeypatch.setattr(stage.gang, "ask_holdings", ask_holdings)
    return answer


def test_a_loaded_node_is_waited_for_as_long_as_it_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = trained(tmp_path)
    answer = held_by(stage, monkeypatch, step=12, ranks={"a": range(2), "b": range(2, 4)})
    a_rank_falls(stage)
    answer("a")
    stage.turn(100)  # 20 s
    assert len(stage.store.run().attempts) == 1, "without b the steps since the last checkpoint would be lost"
    answer("b")
    stage.turn(2)
    attempt = stage.store.run().attempts[-1]
    assert (attempt.number, attempt.first_step) == (2, 13)
    assert attempt.resume_from.startswith("memory:")


@pytest.mark.parametrize("ranks", [4, 2])
def test_a_node_is_not_waited_for_without_need_or_for_ever(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a holds all, b cannot hold anything newer; where a holds half, b has its time."""
    stage, _ = trained(tmp_path)
    answer = held_by(stage, monkeypatch, step=12, ranks={"a": range(ranks)})
    a_rank_falls(stage)
    answer("a")
    stage.turn(8)
    assert len(stage.store.run().attempts) == (2 if ranks == 4 else 1)
    stage.turn(int(SILENT_S / 0.2))
    assert ("what b may hold in memory is not known" in capsys.readouterr().out) is (ranks == 2)
    assert stage.store.run().attempts[1].first_step == (13 if ranks == 4 else 11)


@pytest.mark.parametrize(("told", "waits"), [({}, True), ({"copies_every": 2}, True), ({"copies_every": 4}, False)])
def test_where_copies_lie_apart_the_one_before_is_as_new_as_the_step_before(
    told: dict[str, int], waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be made more seldom than was asked for, and then no step in between is held anywhere."""
    stage, _ = trained(tmp_path)
    answer = held_by(stage, monkeypatch, step=12, ranks={"a": range(4)}, newest=16)
    stage.report("a", "step", 1, rank=0, step=16, **told)
    a_rank_falls(stage)
    answer("a")
    stage.turn(8)
    assert len(stage.store.run().attempts) == (1 if waits else 2)
    stage.turn(int(SILENT_S / 0.2))
    assert stage.store.run().attempts[1].first_step == 13


def test_a_node_that_dies_is_waited_for_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, found = trained(tmp_path)
    answer = held_by(stage, monkeypatch, step=12, ranks={"a": range(2), "b": range(2, 4)})
    a_rank_falls(stage)
    answer("a")
    stage.turn(20)
    assert len(stage.store.run().attempts) == 1
    stage.backend.alive.pop("b")
    stage.gang.say("agent_lost", "b", why="silent")
    stage.turn(4)
    attempt = stage.store.run().attempts[-1]
    assert (attempt.number, attempt.resume_from) == (2, str(found[-1]))


def test_memory_needs_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, _ = trained(tmp_path)
    the_mount_is_gone(stage.store.paths.checkpoint_dir)
    hold(stage, monkeypatch, step=12, attempt=1)
    a_rank_falls(stage)
    attempt = stage.store.run().attempts[-1]
    assert stage.controller.phase is Phase.RUN
    assert (attempt.number, attempt.first_step) == (2, 13)
    assert attempt.resume_from.startswith("memory:")


def out_of_reach(stage: Stage, *, lost: str = "") -> None:
    """The ranks of the newest attempt cannot restore what they were told to."""
    attempt = stage.store.run().attempts[-1]
    for node, ranks in zip(attempt.nodes, ([0, 1], [2, 3]), strict=True):
        stage.gang.say("spawned", node, attempt=attempt.number, ranks=[{"rank": r, "pid": r} for r in ranks])
    told = {"type": "OutOfReach", "message": f"A part of {attempt.resume_from} is out of reach.", "traceback": "t"}
    stage.report("a", "error", attempt.number, rank=0, step=0, **told)
    stage.gang.say("exit", "a", rank=0, attempt=attempt.number, code=7, signal=None, log_tail="")
    if lost:
        stage.backend.alive.pop(lost)
        stage.gang.say("agent_lost", lost, why="silent")
    killed(stage, *attempt.nodes, attempt=attempt.number)
    stage.turn(4)


def test_a_node_that_dies_while_ranks_restore_is_what_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, _ = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    a_rank_falls(stage)
    first = stage.store.run().attempts[-1]
    out_of_reach(stage, lost="b")
    run = stage.store.run()
    assert [fall.kind for fall in run.failures] == ["rank_killed", "node_lost"]
    assert rejections(stage) == []
    assert run.attempts[-1].number == 3
    assert run.attempts[-1].resume_from == first.resume_from  # it is still the newest, and complete


def test_what_was_out_of_reach_twice_is_passed_over_and_nobody_calls_it_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, found = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    a_rank_falls(stage)
    memory = stage.store.run().attempts[-1].resume_from
    out_of_reach(stage)
    assert stage.store.run().attempts[-1].resume_from == memory
    assert rejections(stage) == []
    out_of_reach(stage)
    run = stage.store.run()
    assert rejections(stage) == [memory]
    assert run.attempts[-1].resume_from == str(found[-1])
    assert run.found_damaged == frozenset()
    assert [fall.kind for fall in run.failures] == ["rank_killed", "unreachable", "unreachable"]
    assert {recovery.BUDGET_OF[recovery.FailureKind(fall.kind)] for fall in run.failures} == {"hardware"}


def test_memory_of_a_gang_before_the_one_that_committed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint tells any more which gang is the newest that has committed, but the log does."""
    stage = Stage(tmp_path, backoff_s=0.0)
    stage.start()
    a_rank_falls(stage)
    stage.start()
    path = write_checkpoint(stage.store.paths.checkpoint_dir, 10, (1, 2))
    stage.report("a", "checkpoint", 2, rank=0, step=10, path=str(path), bytes=1, stall_s=0.1)
    stage.turn()
    the_mount_is_gone(stage.store.paths.checkpoint_dir)
    hold(stage, monkeypatch, step=12, attempt=1)
    stage.gang.say("exit", "b", rank=3, attempt=2, code=None, signal=9)
    killed(stage, "a", "b", attempt=2)
    stage.turn(4)
    given_up(stage)
    assert "step 10 was committed" in stage.store.run().reason
