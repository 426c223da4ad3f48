"""What a run has suffered, as ``status`` tells it: incidents, equal errors as one, predicted against measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint.exchange import Traffic
from launcher import forecast, rank_errors
from launcher.account import INCIDENT_CLASSES, PARTS
from launcher.describe import describe
from launcher.gang import Observation
from launcher.gang_state import GangState
from launcher.ledger import account
from launcher.lock import ControllerLock
from launcher.recovery import Failure, FailureKind
from launcher.render import run_text
from launcher.render_incidents import errors_text, forecast_table, incidents_table
from launcher.run import EventKind
from launcher.store import RunStore, write_atomic
from strategies.estimate import Estimator
from strategies.saving import Saving
from strategies.workload import Workload
from tests.support.golden import assert_golden
from tests.support.jobspecs import GPT, make_plan
from tests.support.runs import BUILT, T0, add_steps, begin_attempt, make_run, put, recovered_run


def failure(rank: int, detail: str, kind: FailureKind = FailureKind.RANK_ERROR, node: str = "") -> Failure:
    node = node or f"n{rank // 4}"
    return Failure(kind=kind, time=1.0, node=node, rank=rank, detail=f"rank {rank} on {node} {detail}")


def test_equal_errors_are_one_entry_and_the_cause_comes_first() -> None:
    peers = [
        failure(rank, f"failed at step 9: RuntimeError: 10.0.0.{rank}:5{rank:04d} closed", FailureKind.SECONDARY)
        for rank in (0, 1, 2, 3, 5, 7)
    ]
    cause = failure(6, "failed at step 9: ValueError: no such token")
    lost = Failure(kind=FailureKind.NODE_LOST, time=2.0, node="n9", detail="node n9 was lost: closed")
    first, second, third = rank_errors.grouped([*peers[:3], cause, *peers[3:], lost])
    assert (first["kind"], first["ranks"], first["nodes"]) == ("node_lost", [], ["n9"])
    assert (second["error"], second["ranks"]) == ("failed at step 9: ValueError: no such token", [6])
    assert (third["ranks"], third["nodes"]) == ([0, 1, 2, 3, 5, 7], ["n0", "n1"])
    assert errors_text(4, [first, second, third]).splitlines()[1:] == [
        "  node n9: node n9 was lost: closed",
        "  rank 6: failed at step 9: ValueError: no such token",
        "  6 ranks (0-3, 5, 7): failed at step 9: RuntimeError: ?:? closed",
    ]


def test_512_ranks_with_one_error_are_one_line(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    rank_errors.keep(store.paths, 1, [failure(rank, "exited with code 1: OSError: no") for rank in range(512)])
    found = rank_errors.read(store.paths, 1)
    assert errors_text(1, found).splitlines()[1:] == ["  512 ranks (0-511): exited with code 1: OSError: no"]
    assert rank_errors.read(store.paths, 2) == []
    write_atomic(store.paths.errors(2), b"{")
    assert rank_errors.read(store.paths, 2) == []


def test_a_disk_that_is_full_does_not_hold_up_a_recovery(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    store.paths.attempts.write_text("not a folder")
    rank_errors.keep(store.paths, 1, [failure(0, "x")])
    assert rank_errors.read(store.paths, 1) == []


def test_a_node_that_starts_ranks_afresh_is_said_once() -> None:
    plan = make_plan(dataclasses.replace(GPT, layers=2), 2)
    state = GangState(attempt=1, plan=plan, placement={"a": [0, 1]}, spawned={"a": {0: 10, 1: 11}})
    said = [
        Observation(node="a", kind="pool", time=1.0, data={"state": "fresh", "reason": "2 kernel tasks", "rank": rank})
        for rank in (0, 1)
    ]
    notes = [note for one in said for note in state.observe(one)]
    assert [getattr(note, "data", None) for note in notes] == [{"node": "a", "reason": "2 kernel tasks"}]


def test_document_of_a_run_with_an_incident(tmp_path: Path) -> None:
    store = recovered_run(tmp_path)
    put(store, 32.0, EventKind.POOL_UNSAFE, attempt=2, node="a", reason="the pool has 2 kernel tasks instead of 1")
    document = describe(store, T0 + 100)
    (one,) = document["incidents"]
    assert sum(one[f"{name}_s"] for name in INCIDENT_CLASSES) == pytest.approx(one["total_s"])
    assert (one["kind"], one["node"], one["steps_lost"], one["action"]) == ("node_lost", "c", 2, "restart")
    assert one["teardown_s"] == pytest.approx(0.5)
    assert {f"{part}_s": one[f"{part}_s"] for part, inside in PARTS.items() if inside == "restore"} == {
        "device_s": BUILT["device_s"],
        "communicators_s": BUILT["communicators_s"],
        "engine_s": BUILT["engine_s"],
        "state_s": BUILT["restored_s"],
    }
    assert document["goodput"] == pytest.approx(document["ledger"]["productive"] / document["ledger"]["wall"])
    measured = document["measured"]
    assert set(forecast.KEYS) == set(measured)
    assert measured["step_s"] == pytest.approx(19.8 / 20)
    assert measured["restart_s"] == pytest.approx(one["total_s"] - one["detect_s"] - one["replay_s"])
    assert {f"{phase}_s": measured[f"{phase}_s"] for phase in forecast.PHASES} == pytest.approx(
        {f"{phase}_s": one[f"{phase}_s"] for phase in forecast.PHASES}
    )
    assert "  node a: the pool has 2 kernel tasks instead of 1" in run_text(document)


def test_what_is_predicted_is_what_the_planner_says(tmp_path: Path) -> None:
    """Value by value; and what nobody can predict is said to be so."""
    store = recovered_run(tmp_path)
    request = store.request()
    job = request.job
    work = Workload(
        model=job.model,
        batch=job.batch,
        cluster=request.cluster.watched(request.recovery.detect_s),
        precision=job.train.precision,
        tokens=job.train.steps * job.batch.tokens,
        saving=Saving(job.checkpoint.every, job.checkpoint.memory_every, job.checkpoint.memory_share),
    )
    estimate = Estimator(work).estimate(job.plan)
    found = describe(store, T0 + 100)["predicted"]
    assert found == {
        "step_s": estimate.step_s,
        "step_low_s": estimate.low_s,
        "step_high_s": estimate.high_s,
        "stall_s": estimate.outlook.save_disk_s,
        "detect_s": 5.0,
        "decide_s": None,
        "place_s": None,
        "restore_s": estimate.outlook.restore_s,
        "replay_s": estimate.outlook.replay_s,
        "restart_s": work.hardware.restart_s + estimate.outlook.restore_s,
        "goodput": estimate.outlook.goodput,
    }
    shown = forecast_table(found, describe(store, T0 + 100)["measured"])
    assert [" not predicted " in line for line in shown.splitlines()[1:]].count(True) == 2


def test_the_detection_that_is_predicted_is_the_one_that_is_configured(tmp_path: Path) -> None:
    request = recovered_run(tmp_path).request()
    assert request.cluster.hardware is not None
    hardware = dataclasses.replace(request.cluster.hardware, failures_per_node_day=10.0, detect_s=30.0)
    request = dataclasses.replace(request, cluster=dataclasses.replace(request.cluster, hardware=hardware))
    slow = dataclasses.replace(request, recovery=dataclasses.replace(request.recovery, detect_s=20.0))
    one, other = (forecast.predicted(which, request.job.plan) for which in (request, slow))
    assert (one["detect_s"], other["detect_s"]) == (5.0, 20.0)
    assert one["goodput"] > other["goodput"]


def test_a_cluster_that_nothing_is_known_about_has_no_prediction(tmp_path: Path) -> None:
    store = recovered_run(tmp_path)
    request = store.request()
    bare = dataclasses.replace(request, cluster=dataclasses.replace(request.cluster, hardware=None))
    assert "hardware" in forecast.predicted(bare, request.job.plan)["why"]
    script = dataclasses.replace(request, job=dataclasses.replace(request.job, kind="script"))
    predicted = forecast.predicted(script, request.job.plan)
    assert "script" in predicted["why"]
    assert forecast_table(predicted, {}).startswith("not predicted: ")


def test_a_bad_night(tmp_path: Path) -> None:
    """Failures of several kinds, one in the middle of a recovery, one that is being recovered from now."""
    store = make_run(tmp_path)
    nodes = ["node-a", "f" * 56, "node-c", "node-d"]
    begin_attempt(store, 1, 2.0, nodes=nodes, step=1, reason="start")
    add_steps(store, 1, 1, 12, 4.0)
    put(store, 14.0, EventKind.CHECKPOINT_COMMITTED, attempt=1, step=10, path="x", bytes=1, stall_s=0.2)
    fail(store, 1, 16.5, {"kind": "hang", "rank": 3, "node": nodes[1], "detail": "rank 3 (0,1,1) holds the gang up"})
    put(store, 20.0, EventKind.ATTEMPT_PLANNED, attempt=2, plan={}, nodes=nodes, resume_from="x", **AGAIN)
    fail(store, 2, 21.0, {"kind": "node_lost", "rank": -1, "node": "node-c", "detail": "node node-c was lost"})
    put(store, 24.0, EventKind.WAITING_FOR_NODES, attempt=2, have=3, need=4, why="the cluster is small")
    begin_attempt(store, 3, 600.0, nodes=nodes, step=11, reason="restart", **BUILT)
    add_steps(store, 3, 11, 18, 602.0)
    fail(store, 3, 610.5, {"kind": "rank_error", "rank": 5, "node": "node-d", "detail": "rank 5 on node-d: no"}, 5.0)
    errors = [failure(rank, "failed at step 19: RuntimeError: no", node="node-d") for rank in (4, 5, 6, 7)]
    rank_errors.keep(store.paths, 3, errors)
    ControllerLock.acquire(store.paths)
    document = describe(store, T0 + 613.0)
    hang, lost, error = document["incidents"]
    assert (lost["state_s"], lost["teardown_s"]) == (BUILT["restored_s"], 0.5)
    assert [one[f"{part}_s"] for one in (hang, error) for part in PARTS] == [0.5, None, None, None, None] * 2
    books = account(store.events(), store.metrics(), T0 + 613.0)
    assert sum(one["total_s"] for one in document["incidents"]) + sum(books.rest.values()) == pytest.approx(613.0)
    shown = run_text({**document, "attempts": document["attempts"][-1:], "ranks": []})
    assert_golden("bad-night.txt", shown.replace(str(tmp_path), "RUNS"))
    assert len(incidents_table(document["incidents"] * 9, live=True).splitlines()) == 2 * (2 + 12)
    assert "(the newest 12 of 27)" in incidents_table(document["incidents"] * 9, live=True)


LAST = {1: 12, 2: 10, 3: 18}
AGAIN: dict[str, Any] = {"first_step": 11, "reason": "restart"}


def fail(store: RunStore, attempt: int, at: float, what: dict[str, Any], delay_s: float = 0.0) -> None:
    """A failure, noticed a second later."""
    put(
        store,
        at + 1,
        EventKind.FAILURE_DETECTED,
        attempt=attempt,
        failure=what,
        last_step=LAST[attempt],
        failed_at=T0 + at,
    )
    verdict = {"cause": what["detail"], "failure": what["kind"], "node": what["node"], "rank": what["rank"]}
    put(store, at + 1.5, EventKind.GANG_STOPPED, attempt=attempt, signature="", **verdict)
    put(store, at + 1.5, EventKind.DECISION, attempt=attempt, action="restart", reason="", delay_s=delay_s)


def test_parts_are_shown_where_any_is_known() -> None:
    whole = {"number": 1, "at": T0, "kind": "hang", "rank": 1, "node": "", "total_s": 3.5, "steps_lost": 0}
    one = whole | {"recovered": True, "action": "restart"} | dict.fromkeys((f"{n}_s" for n in INCIDENT_CLASSES), 0.5)
    silent = one | {f"{part}_s": None for part in PARTS}
    assert "of which" not in incidents_table([silent], live=False)
    told = silent | {"number": 2, "teardown_s": 0.25, "device_s": 0.125}
    assert incidents_table([silent, told], live=False).splitlines()[-2:] == [
        "#  DECIDE: TEARDOWN  RESTORE: DEVICE  COMMUNICATORS  ENGINE  STATE  REST",
        "2              0.25             0.12              -       -      -  0.38",
    ]


def began(*reports: dict[str, Any]) -> list[dict[str, Any]]:
    """What is on record of how training began, after some reports of two ranks."""
    plan = make_plan(dataclasses.replace(GPT, layers=2), 2)
    state = GangState(attempt=1, plan=plan, placement={"a": [0, 1]}, spawned={"a": {0: 10, 1: 11}})
    start = {"kind": "training", "rank": 0, "step": 4}
    said = [Observation(node="a", kind="report", time=1.0, data={"attempt": 1} | data) for data in (*reports, start)]
    return [dict(note.data) for one in said for note in state.observe(one) if not isinstance(note, Failure)]


def test_how_long_the_slowest_rank_built_is_told_once_training_begins() -> None:
    """The wait of the others for the rank that came last is no meeting, and is not counted twice."""
    quick = {"kind": "built", "rank": 0, "device_s": 0.25, "communicators_s": 4.5, "engine_s": 1.0}
    last = {"kind": "built", "rank": 1, "device_s": 4.25, "communicators_s": 0.5, "engine_s": 1.5}
    expected = {"step": 4, "began": 1.0, "device_s": 4.25, "communicators_s": 0.5, "engine_s": 1.5}
    assert began(quick, last) == began(last, quick) == [expected]
    assert began(quick, last, quick, last) == [expected], "an agent tells a new controller all of it again"


def test_ranks_that_tell_nothing_of_their_engines_train_all_the_same() -> None:
    bare = {"step": 4, "began": 1.0}
    assert began() == [bare]
    assert began({"kind": "built", "rank": 1}) == [bare]
    one = {"kind": "built", "rank": 1, "device_s": 0.5, "communicators_s": 0.25}
    assert began(one) == [bare | {"device_s": 0.5, "communicators_s": 0.25}]
    late = {"kind": "built", "rank": 1, "attempt": 2, "device_s": 9.0}
    assert began(late) == [bare], "it is of another attempt"


def test_how_long_the_slowest_rank_read_is_told_once_training_begins() -> None:
    plan = make_plan(dataclasses.replace(GPT, layers=2), 2)
    state = GangState(attempt=1, plan=plan, placement={"a": [0, 1]}, spawned={"a": {0: 10, 1: 11}})
    moved = dataclasses.asdict(Traffic(read_bytes=10, received_bytes=5))  # as a rank tells it
    reports = [
        {"kind": "restored", "rank": rank, "attempt": 1, "step": 4, "seconds": 0.5 + rank} | moved for rank in (0, 1)
    ]
    reports.append({"kind": "training", "rank": 0, "attempt": 1, "step": 4})
    notes = [
        note for data in reports for note in state.observe(Observation(node="a", kind="report", time=1.0, data=data))
    ]
    expected = {"step": 4, "began": 1.0, "restored_s": 1.5, "restored_bytes": 20.0}
    assert [getattr(note, "data", None) for note in notes] == [expected]
