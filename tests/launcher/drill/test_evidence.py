"""What counts as proven: the record of who did it, and the log of who knew nothing, agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.drill import bounds, evidence
from launcher.drill.case import Aim
from launcher.progress import fault_records
from launcher.run import EventKind
from launcher.store import RunStore
from tests.support.drills import AIM, attempt, begun, case, ended, fall, gathered, metrics, proof
from tests.support.runs import put

KILL = "rank_kill.rank-3.step-8"
FLIPPED = "one bit flipped in step-00000006/e0001-a0001/shard-00000.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """Two attempts: rank 3 was killed at step 8, and the second began at step 7."""
    store = begun(tmp_path)
    attempt(store, 1, 2.0, why="start")
    fall(store, 12.5, "rank_killed", rank=3)
    attempt(store, 2, 13.0, first=7, why="restart")
    metrics(store, 1, range(1, 8), 11.0)
    metrics(store, 2, range(7, 21), 13.0)
    ended(store, 20)
    return store


def test_proof_and_log_agree(run: RunStore) -> None:
    proof(run, KILL, 12.0)
    found = gathered("rank_sigkill", run)
    assert found.fired
    assert "rank 3 was killed" in found.proof
    assert found.detected_s == pytest.approx(0.5)
    assert found.within_s == pytest.approx(bounds.SLACK_S)
    assert found.recovered_s == pytest.approx(13.7 - 12.0)  # step 7 of attempt 2
    assert (found.steps_lost, found.most_lost, found.resumes, found.smaller) == (1, 1, 0, False)


def test_without_its_proof_it_has_not_fired(run: RunStore) -> None:
    found = gathered("rank_sigkill", run)
    assert not found.fired
    assert f"no proof of {KILL}" in found.proof


def test_a_failure_of_another_kind_will_not_do(run: RunStore) -> None:
    proof(run, "rank_stop.rank-3.step-8", 12.0)
    found = gathered("rank_sigstop", run)
    assert not found.fired
    assert "should show hang; it shows rank_killed" in found.proof


def test_a_failure_at_another_place_will_not_do(run: RunStore) -> None:
    proof(run, "rank_kill.rank-2.step-8", 12.0)
    elsewhere = Aim(rank=2, node=1, other=0, step=8)
    found = gathered("rank_sigkill", run, elsewhere)
    assert not found.fired
    assert "does not name the place of rank_kill@rank=2,step=8" in found.proof


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (EventKind.DECISION, {"action": "swap", "reason": "c takes the place of a: it stands by", "delay_s": 0.0}),
        (EventKind.GANG_STOPPED, {"cause": "node a was lost: closed", "failure": "node_lost", "last_step": 7}),
    ],
)
def test_a_node_that_dies_in_a_recovery_must_be_noticed(run: RunStore, kind: EventKind, told: dict[str, Any]) -> None:
    """The death of the rank that came before it is none of its proof."""
    proof(run, KILL, 12.0)
    proof(run, "drill.1", 12.5, did="SIGKILL of all 4 processes of a")
    found = gathered("node_kill_in_recovery", run)
    assert not found.fired
    assert "the log should show node_lost or swap; it shows rank_killed" in found.proof
    put(run, 21, kind, attempt=1, **told)
    found = gathered("node_kill_in_recovery", run)
    assert found.fired
    assert str(told.get("reason") or told.get("cause")) in found.proof


def test_what_dies_in_a_recovery_is_timed_by_what_the_log_says_afterwards(run: RunStore) -> None:
    """The log knew of the first death before the second came: that is no answer to it."""
    proof(run, KILL, 12.0)
    proof(run, "drill.1", 12.7, did="SIGKILL of all 4 processes of a")
    put(run, 12.8, EventKind.DECISION, attempt=1, action="restart", reason="rank 3 was killed", delay_s=0.0)
    reason = "c takes the place of a: it stands by"
    put(run, 21, EventKind.DECISION, attempt=1, action="swap", reason=reason, delay_s=0.0)
    assert gathered("node_kill_in_recovery", run).detected_s == pytest.approx(21 - 12.7)


def test_two_that_die_at_once_can_be_known_too_late(run: RunStore) -> None:
    names = [f"node_kill.node-{node}.step-8" for node in (1, 0)]
    for name, at in zip(names, (2.5, 2.6), strict=True):
        proof(run, name, at)
    found = gathered("two_nodes", run)
    assert found.detected_s == pytest.approx(12.5 - 2.6)
    assert found.late
    proof(run, names[1], 12.55)  # the log speaks of the one that died first, and of nothing afterwards
    assert gathered("two_nodes", run).detected_s == pytest.approx(12.5 - 2.5)


def test_damage_must_be_found(run: RunStore) -> None:
    for number, did in ((1, FLIPPED), (2, "SIGKILL of rank process 7")):
        proof(run, f"drill.{number}", 12.0, did=did)
    assert not gathered("flipped_bit", run).fired
    path = "/runs/run/checkpoints/step-0000000{}/e0001-a0001.manifest.json"
    put(run, 21, EventKind.CHECKPOINT_REJECTED, attempt=1, path=path.format(3), reason="digest")
    assert not gathered("flipped_bit", run).fired, "another checkpoint"
    put(run, 22, EventKind.CHECKPOINT_REJECTED, attempt=1, path=path.format(6), reason="digest")
    found = gathered("flipped_bit", run)
    assert found.fired
    assert f"{FLIPPED} + SIGKILL of rank process 7" in found.proof
    assert "reason digest" in found.proof


def test_the_held_rank_and_the_relief_are_no_faults(run: RunStore) -> None:
    proof(run, "rank_stop.rank-3.step-8", 11.0)
    proof(run, "drill.1", 12.0, did="link down")
    proof(run, "drill.2.relief", 19.0, did="SIGCONT")
    records = fault_records(run.paths)
    assert [one["id"] for one in evidence.strikes(case("partition"), AIM, records)] == ["drill.1"]


def test_an_act_whose_moment_never_came(run: RunStore) -> None:
    proof(run, "drill.1", 12.0, did="link down")
    found = gathered("partition", run, undone=1)
    assert not found.fired
    assert "never came" in found.proof


def test_what_must_not_be_taken_for_a_failure(run: RunStore) -> None:
    proof(run, "drill.1", 12.0, did="slow")
    found = gathered("slow_link", run)
    assert not found.fired
    assert "should show no failure; it shows rank_killed" in found.proof


def test_a_controller_must_die_by_its_signal_and_be_replaced(run: RunStore) -> None:
    proof(run, "controller_kill.run", 15.0, did="SIGKILL of controller 1 in RUN")
    assert "not by signal 9" in gathered("controller_kill_run", run).proof
    assert "a second controller that adopts" in gathered("controller_kill_run", run, exits=(-9, 0)).proof
