"""What a failure is, what it costs the budget, and whom it is held against: tables, without any process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from launcher import exclusion, policy, recovery
from launcher.attempts import Fall
from launcher.headway import Headway
from launcher.recovery import BUDGET_OF, Action, Failure, FailureKind
from launcher.request import Budgets, RecoverySpec
from launcher.run import EventKind, Run, RunEvent, apply, fold

K = FailureKind
STARVED = "the kernel had just killed 1 process of the cgroup /pod, which may use 8.00 GB, for want of memory"


def error(kind: str, message: str, trace: str = "") -> Mapping[str, Any]:
    return {"type": kind, "message": message, "traceback": trace, "step": 5}


@pytest.mark.parametrize(
    ("exit", "report", "kind"),
    [
        ({"signal": 9}, None, K.RANK_KILLED),
        ({"signal": 9, "oom": ""}, None, K.RANK_KILLED),
        ({"signal": 9, "oom": STARVED}, None, K.OUT_OF_MEMORY),
        ({"code": 137, "oom": STARVED}, None, K.OUT_OF_MEMORY),
        ({"code": 17}, None, K.RANK_EXIT),
        ({"code": 1}, error("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"), K.OUT_OF_MEMORY),
        ({"code": 1}, error("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried"), K.OUT_OF_MEMORY),
        ({"code": 1}, error("MemoryError", ""), K.OUT_OF_MEMORY),
        ({"code": 3}, error("PlanInfeasible", "The plan cannot run."), K.BAD_CONFIG),
        ({"code": 6}, error("ResumeRefused", "The checkpoint is of another run."), K.BAD_CONFIG),
        ({"code": 7}, error("StorageError", "Cannot write"), K.RANK_ERROR),
        ({"code": 1}, error("RuntimeError", "Connection closed by peer"), K.SECONDARY),
        ({"code": 1}, error("ValueError", "bad sample"), K.RANK_ERROR),
    ],
)
def test_what_an_exit_means(exit: dict[str, Any], report: Mapping[str, Any] | None, kind: FailureKind) -> None:
    data = {"rank": 2, "code": None, "signal": None, "log_tail": "", **exit}
    assert recovery.classify_exit(data, node="a", when=1.0, error=report).kind is kind


def test_the_same_want_of_memory_is_known_again_whatever_was_free() -> None:
    trace = 'Traceback:\n  File "x.py", line 3, in f\n    y = x @ x\nOutOfMemoryError: {} MiB is free'
    found = [
        recovery.classify_exit(
            {"rank": 0, "code": 1, "signal": None},
            node="a",
            when=1.0,
            error=error("OutOfMemoryError", f"CUDA out of memory, {free} MiB is free", trace.format(free)),
        )
        for free in (12, 57)
    ]
    assert found[0].signature == found[1].signature != ""


# --- budgets ------------------------------------------------------------------------------------------------------


def decided(falls: list[tuple[K, float]], spec: RecoverySpec | None = None, **run: Any) -> recovery.Decision:
    """What is decided after these failures; the last one has just been recorded."""
    failures = tuple(Fall(kind=kind.value, time=time) for kind, time in falls)
    kind, time = falls[-1]
    state = Run(failures=failures, **run)
    return policy.decide(state, Failure(kind=kind, time=time, detail="it failed"), spec or RecoverySpec())


@pytest.mark.parametrize("kind", sorted(BUDGET_OF))
def test_each_kind_has_a_budget_of_its_own(kind: FailureKind) -> None:
    spec = RecoverySpec(budgets=replace(Budgets(), **{BUDGET_OF[kind]: 2}), max_restarts=99)
    assert decided([(kind, 1.0), (kind, 2.0)], spec).action is Action.RESTART
    third = decided([(kind, 1.0), (kind, 2.0), (kind, 3.0)], spec)
    assert third.action is Action.GIVE_UP
    assert f"recovery.budgets.{BUDGET_OF[kind]}" in third.reason
    others = [other for other in BUDGET_OF if BUDGET_OF[other] != BUDGET_OF[kind]]
    mixed = [(kind, 1.0), *((other, 1.5) for other in others), (kind, 2.0)]
    assert decided(mixed, spec).action is Action.RESTART


def test_lost_nodes_do_not_eat_the_budget_of_errors() -> None:
    falls = [(K.NODE_LOST, float(time)) for time in range(10)]
    assert decided([*falls, (K.RANK_ERROR, 10.0)]).action is Action.RESTART


def test_all_kinds_together_have_one_budget_too() -> None:
    spec = RecoverySpec(max_restarts=3)
    falls = [(K.NODE_LOST, 1.0), (K.HANG, 2.0), (K.RANK_KILLED, 3.0)]
    assert decided(falls, spec).action is Action.RESTART
    last = decided([*falls, (K.NODE_LOST, 4.0)], spec)
    assert last.action is Action.GIVE_UP
    assert "all 3 restarts are used within 60 minutes (recovery.max_restarts)" in last.reason


def test_a_large_cluster_fails_all_the_time_and_that_is_no_reason_to_stop() -> None:
    falls = [(K.NODE_LOST, 600.0 * number) for number in range(2000)]  # one in ten minutes, for two weeks
    assert decided(falls).action is Action.RESTART
    forever = RecoverySpec(budget_window_s=None)
    assert decided(falls, forever).action is Action.GIVE_UP


def test_preemptions_are_free_unless_said_otherwise() -> None:
    falls = [(K.PREEMPTED, float(time)) for time in range(100)]
    assert decided(falls).action is Action.RESTART
    assert decided([*falls, (K.NODE_LOST, 100.0)], RecoverySpec(max_restarts=1)).action is Action.RESTART
    assert decided(falls, RecoverySpec(budgets=Budgets(preemption=50))).action is Action.GIVE_UP


def test_bad_configuration_is_not_tried_again() -> None:
    found = decided([(K.BAD_CONFIG, 1.0)])
    assert found.action is Action.GIVE_UP
    assert "it failed" in found.reason


def test_restarts_that_lead_nowhere_end() -> None:
    spec = RecoverySpec(no_progress_limit=3)
    assert decided([(K.NODE_LOST, 1.0)], spec, headway=Headway(idle_restarts=2)).action is Action.RESTART
    stuck = decided([(K.NODE_LOST, 1.0)], spec, headway=Headway(idle_restarts=3, best_step=9, mark=7))
    assert stuck.action is Action.GIVE_UP
    assert "3 restarts in a row have led to no newer checkpoint and no step beyond 7" in stuck.reason
    assert decided([(K.PREEMPTED, 1.0)], spec, headway=Headway(idle_restarts=3)).action is Action.RESTART


@pytest.mark.parametrize(("idle", "delay_s"), [(0, 0.0), (1, 1.0), (2, 2.0), (3, 4.0), (7, 60.0)])
def test_who_gets_nowhere_waits_longer_and_longer(idle: int, delay_s: float) -> None:
    headway = Headway(idle_restarts=idle)
    assert decided([(K.NODE_LOST, 1.0)], headway=headway).delay_s == delay_s
    assert decided([(K.PREEMPTED, 1.0)], headway=headway).delay_s == 0.0
    lost, spec = Failure(kind=K.DEVICE_LOST, time=1.0, node="a"), RecoverySpec()
    left_out = Run(headway=headway, excluded={"a": 9.0})
    assert policy.decide(left_out, lost, spec, spare=True).delay_s == 0.0
    assert policy.decide(left_out, lost, spec).delay_s == delay_s  # it may have to be taken back


# --- what the log makes of it -------------------------------------------------------------------------------------


def log(*lines: tuple[EventKind, dict[str, Any]]) -> list[RunEvent]:
    return [
        RunEvent(seq=i + 1, time=float(i), epoch=1, attempt=1, kind=kind, data=data)
        for i, (kind, data) in enumerate(lines)
    ]


def attempt(first: int, reason: str, last: int, failure: str = "rank_killed") -> list[tuple[EventKind, dict[str, Any]]]:
    planned = {"plan": {}, "nodes": ["a"], "resume_from": "", "first_step": first, "reason": reason}
    return [
        (EventKind.ATTEMPT_PLANNED, planned),
        (EventKind.GANG_STOPPED, {"cause": "c", "failure": failure, "node": "a", "last_step": last}),
    ]


def test_a_newer_step_is_progress_and_the_same_steps_again_are_not() -> None:
    story = [*attempt(1, "start", 4), *attempt(1, "restart", 4), *attempt(1, "restart", 3)]
    run = fold(log(*story))
    assert (run.restarts, run.headway.idle_restarts, run.headway.best_step) == (2, 2, 4)
    assert [fall.node for fall in run.failures] == ["a", "a", "a"]
    assert fold(log(*story, *attempt(1, "restart", 5))).headway.idle_restarts == 0
    moved = fold(log(*story, *attempt(1, "move", 4)))
    assert (moved.restarts, moved.headway.idle_restarts) == (2, 2)


def test_a_persons_resume_clears_what_was_held_against_anybody() -> None:
    out = (EventKind.NODE_EXCLUDED, {"node": "a", "until": 99.0, "reason": "r"})
    run = fold(log(*attempt(1, "start", 4), out))
    assert (dict(run.excluded), len(run.failures)) == ({"a": 99.0}, 1)
    resumed = apply(run, log((EventKind.RESUME_REQUESTED, {}))[0])
    assert (dict(resumed.excluded), resumed.failures, resumed.headway.idle_restarts) == ({}, (), 0)


# --- bad nodes ----------------------------------------------------------------------------------------------------


def falls(*times: float, kind: K = K.RANK_KILLED, node: str = "a") -> Run:
    return Run(failures=tuple(Fall(kind=kind.value, time=time, node=node) for time in times))


SPEC = RecoverySpec(exclude_after=3, exclude_window_s=100.0, exclude_for_s=1000.0)


def test_the_third_failure_of_a_node_excludes_it_for_a_while() -> None:
    assert exclusion.after_failure(falls(1.0, 2.0), SPEC) is None
    found = exclusion.after_failure(falls(1.0, 2.0, 50.0), SPEC)
    assert found is not None
    assert (found.node, found.until) == ("a", 1050.0)
    assert "3 failures within 49 s" in found.reason


@pytest.mark.parametrize(
    "run",
    [
        falls(1.0, 2.0, 102.5),  # the first is too long ago
        falls(1.0, 2.0, 3.0, kind=K.RANK_ERROR),  # the code's, not the node's
        falls(1.0, 2.0, 3.0, kind=K.PREEMPTED),
        falls(1.0, 2.0, 3.0, node=""),
        replace(falls(1.0, 2.0, 3.0), excluded={"a": 5.0}),  # it is out already
        Run(failures=(*falls(1.0, 2.0).failures, *falls(3.0, node="b").failures)),
    ],
)
def test_what_does_not_speak_against_a_node(run: Run) -> None:
    assert exclusion.after_failure(run, SPEC) is None
    assert exclusion.after_failure(falls(1.0, 2.0, 3.0), replace(SPEC, exclude_after=None)) is None


@pytest.mark.parametrize(
    ("excluded", "need", "nodes", "back"),
    [
        ({}, 2, "abc", ""),
        ({"a": 50.0}, 2, "bc", ""),
        ({"a": 5.0}, 2, "abc", ""),  # its time is over
        ({"a": 50.0, "b": 60.0}, 2, "ac", "a"),  # the one whose time is over first
        ({"a": 50.0, "b": 60.0}, 3, "abc", "ab"),
        ({"a": 50.0}, 4, "bc", ""),  # it would not help
        ({"z": 50.0}, 2, "abc", ""),
    ],
)
def test_a_bad_node_is_better_than_no_plan(excluded: dict[str, float], need: int, nodes: str, back: str) -> None:
    found, again = exclusion.usable(set("abc"), excluded, 10.0, lambda count: count >= need)
    assert (found, again) == (frozenset(nodes), tuple(back))
