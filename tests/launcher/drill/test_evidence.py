"""What counts as proven: the record of who did it, and the log of who knew nothing, agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import bounds, evidence
from launcher.drill.case import Aim, Case, Outcome
from launcher.drill.catalogue import named
from launcher.drill.compare import Comparison, compare
from launcher.drill.rehearsal import Ended
from launcher.progress import fault_records
from launcher.run import EventKind
from launcher.store import RunStore
from tests.support.fakes import tiny_request
from tests.support.runs import T0, put

AIM = Aim(rank=3, node=1, other=0, step=8)
KILL = "rank_kill.rank-3.step-8"
NODES = ["a", "b"]


def case(name: str) -> Case:
    found = named(name)
    assert found is not None
    return found


def proof(run: RunStore, name: str, at: float, **more: Any) -> None:
    run.paths.faults.mkdir(exist_ok=True)
    record = {"fault": name, "time": T0 + at, "attempt": 1} | more
    (run.paths.faults / f"{name}.json").write_text(json.dumps(record))


def metrics(run: RunStore, attempt: int, steps: Sequence[int], at: float, loss: float = 0.1) -> None:
    with open(run.paths.metrics, "a") as file:
        for step in steps:
            line = {"step": step, "attempt": attempt, "time": T0 + at + step * 0.1, "loss": loss * step}
            line |= {"seconds": 0.08, "stall_s": 0.02}
            file.write(json.dumps(line | {"grad_norm": 1.0, "lr": 1e-3}) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """Two attempts: rank 3 was killed at step 8, and the second began at step 7."""
    request = tiny_request(tmp_path, name="run")
    job = replace(request.job, checkpoint=replace(request.job.checkpoint, memory_every=1))
    store = RunStore.create(replace(request, job=job))
    store.paths.events.unlink()
    plan = store.request().job.plan
    put(store, 0, EventKind.RUN_SUBMITTED, epoch=0, request="x")
    put(store, 1, EventKind.CONTROLLER_STARTED, adopted=False, pid=1)
    for number, at, first in ((1, 2.0, 1), (2, 13.0, 7)):
        data: dict[str, Any] = {"plan": plan, "nodes": NODES, "resume_from": "", "first_step": first}
        put(store, at, EventKind.ATTEMPT_PLANNED, attempt=number, **data, reason="restart" if number > 1 else "start")
        put(store, at + 0.1, EventKind.TRAINING_STARTED, attempt=number, step=first)
        if number == 1:
            put(store, 12.5, EventKind.FAILURE_DETECTED, attempt=1, **killed(3), last_step=7, failed_at=T0 + 12)
            put(store, 12.6, EventKind.GANG_STOPPED, attempt=1, cause="rank 3 on b", failure="rank_killed", last_step=7)
    metrics(store, 1, range(1, 8), 11.0)
    metrics(store, 2, range(7, 21), 13.0)
    put(store, 20, EventKind.RUN_SUCCEEDED, attempt=2, step=20, weights_digest="w")
    return store


def killed(rank: int) -> dict[str, Any]:
    what = {"kind": "rank_killed", "time": T0 + 12.4, "rank": rank, "node": "b", "detail": f"rank {rank} was killed"}
    return {"failure": what}


def of(name: str, run: RunStore, **more: Any) -> evidence.Evidence:
    return evidence.gather(case(name), AIM, Ended(**{"store": run, "exits": (0,), **more}))


def test_proof_and_log_agree(run: RunStore) -> None:
    proof(run, KILL, 12.0)
    found = of("rank_sigkill", run)
    assert found.fired
    assert "rank 3 was killed" in found.proof
    assert found.detected_s == pytest.approx(0.5)
    assert found.within_s == pytest.approx(bounds.SLACK_S)
    assert found.recovered_s == pytest.approx(13.7 - 12.0)  # step 7 of attempt 2
    assert (found.steps_lost, found.most_lost, found.resumes, found.smaller) == (1, 1, 0, False)


def test_without_its_proof_it_has_not_fired(run: RunStore) -> None:
    found = of("rank_sigkill", run)
    assert not found.fired
    assert f"no proof of {KILL}" in found.proof


def test_a_failure_of_another_kind_will_not_do(run: RunStore) -> None:
    proof(run, "rank_stop.rank-3.step-8", 12.0)
    found = of("rank_sigstop", run)
    assert not found.fired
    assert "should show hang; it shows rank_killed" in found.proof


def test_a_failure_at_another_place_will_not_do(run: RunStore) -> None:
    proof(run, "rank_kill.rank-2.step-8", 12.0)
    elsewhere = Aim(rank=2, node=1, other=0, step=8)
    found = evidence.gather(case("rank_sigkill"), elsewhere, Ended(store=run, exits=(0,)))
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
    found = of("node_kill_in_recovery", run)
    assert not found.fired
    assert "the log should show node_lost or swap; it shows rank_killed" in found.proof
    put(run, 21, kind, attempt=1, **told)
    found = of("node_kill_in_recovery", run)
    assert found.fired
    assert str(told.get("reason") or told.get("cause")) in found.proof


def test_what_dies_in_a_recovery_is_timed_by_what_the_log_says_afterwards(run: RunStore) -> None:
    """The log knew of the first death before the second came: that is no answer to it."""
    proof(run, KILL, 12.0)
    proof(run, "drill.1", 12.7, did="SIGKILL of all 4 processes of a")
    put(run, 12.8, EventKind.DECISION, attempt=1, action="restart", reason="rank 3 was killed", delay_s=0.0)
    reason = "c takes the place of a: it stands by"
    put(run, 21, EventKind.DECISION, attempt=1, action="swap", reason=reason, delay_s=0.0)
    assert of("node_kill_in_recovery", run).detected_s == pytest.approx(21 - 12.7)


def test_two_that_die_at_once_can_be_known_too_late(run: RunStore) -> None:
    names = [f"node_kill.node-{node}.step-8" for node in (1, 0)]
    for name, at in zip(names, (2.5, 2.6), strict=True):
        proof(run, name, at)
    found = of("two_nodes", run)
    assert found.detected_s == pytest.approx(12.5 - 2.6)
    assert found.late
    proof(run, names[1], 12.55)  # the log speaks of the one that died first, and of nothing afterwards
    assert of("two_nodes", run).detected_s == pytest.approx(12.5 - 2.5)


def test_damage_must_be_found(run: RunStore) -> None:
    for number, did in ((1, "one bit flipped"), (2, "SIGKILL of rank process 7")):
        proof(run, f"drill.{number}", 12.0, did=did)
    assert not of("flipped_bit", run).fired
    put(run, 21, EventKind.CHECKPOINT_REJECTED, attempt=1, path="p", reason="digest")
    found = of("flipped_bit", run)
    assert found.fired
    assert "one bit flipped + SIGKILL of rank process 7" in found.proof
    assert "reason digest" in found.proof


def test_the_held_rank_and_the_relief_are_no_faults(run: RunStore) -> None:
    proof(run, "rank_stop.rank-3.step-8", 11.0)
    proof(run, "drill.1", 12.0, did="link down")
    proof(run, "drill.2.relief", 19.0, did="SIGCONT")
    records = fault_records(run.paths)
    assert [one["id"] for one in evidence.strikes(case("partition"), AIM, records)] == ["drill.1"]


def test_an_act_whose_moment_never_came(run: RunStore) -> None:
    proof(run, "drill.1", 12.0, did="link down")
    found = of("partition", run, undone=1)
    assert not found.fired
    assert "never came" in found.proof


def test_what_must_not_be_taken_for_a_failure(run: RunStore) -> None:
    proof(run, "drill.1", 12.0, did="slow")
    found = of("slow_link", run)
    assert not found.fired
    assert "should show no failure; it shows rank_killed" in found.proof


def test_a_controller_must_die_by_its_signal_and_be_replaced(run: RunStore) -> None:
    proof(run, "controller_kill.run", 15.0, did="SIGKILL of controller 1 in RUN")
    assert "not by signal 9" in of("controller_kill_run", run).proof
    assert "a second controller that adopts" in of("controller_kill_run", run, exits=(-9, 0)).proof


def test_comparison_sees_one_bit_and_one_digest(tmp_path: Path, run: RunStore) -> None:
    other = RunStore.create(tiny_request(tmp_path, name="undisturbed"))
    other.paths.events.write_bytes(run.paths.events.read_bytes())
    metrics(other, 1, range(1, 21), 5.0)
    assert compare(run, other) == Comparison(identical=True, worst=0.0)
    metrics(other, 1, [9], 5.0, loss=0.1 * (1 + 2**-52))
    found = compare(run, other)
    assert (found.identical, found.first) == (False, 9)
    assert 0 < found.worst < 1e-15
    assert not found.meets(Outcome.SAME, "fp32")
    assert found.meets(Outcome.CLOSE, "fp32")


def test_a_run_that_failed_is_not_compared(tmp_path: Path, run: RunStore) -> None:
    other = RunStore.create(tiny_request(tmp_path, name="other"))
    put(other, 30, EventKind.RUN_FAILED, reason="an example")
    assert compare(other, run).problem == "the run failed: an example"


def test_another_digest_is_another_run(tmp_path: Path, run: RunStore) -> None:
    other = RunStore.create(tiny_request(tmp_path, name="undisturbed"))
    other.paths.events.write_text(
        run.paths.events.read_text().replace('"weights_digest": "w"', '"weights_digest": "v"')
    )
    metrics(other, 1, range(1, 21), 5.0)
    assert not compare(run, other).meets(Outcome.SAME, "fp32")
