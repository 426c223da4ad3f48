"""Faults are proven by a failure of their own: of the right kind, at the right place, in the attempt they fired in."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.faults import named
from launcher.proof import unproven
from launcher.run import EventKind, RunEvent

RANK, NODE = "rank_kill@rank=3,step=5", "node_kill@node=1,step=8"


def event(kind: EventKind, at: float, attempt: int, **data: Any) -> RunEvent:
    return RunEvent(seq=1, time=at, epoch=1, attempt=attempt, kind=kind, data=data)


def fall(attempt: int, at: float, kind: str, *, rank: int = -1, node: str = "", cause: str = "") -> list[RunEvent]:
    """An attempt on the nodes a and b that ends."""
    failure = {"kind": kind, "rank": rank, "node": node}
    return [
        event(EventKind.ATTEMPT_PLANNED, at - 9, attempt, nodes=["a", "b"]),
        event(EventKind.FAILURE_DETECTED, at, attempt, failure=failure),
        event(EventKind.GANG_STOPPED, at + 1, attempt, cause=cause, failure=kind),
    ]


def fired(fault: str, at: float, attempt: int, number: int = 0) -> dict[str, Any]:
    name = named([fault] * (number + 1))[number][0]
    return {"id": name, "fault": fault, "time": at, "attempt": attempt}


def test_each_fault_has_its_failure() -> None:
    log = [*fall(1, 10, "rank_killed", rank=3, node="b"), *fall(2, 20, "node_lost", node="b")]
    assert unproven([RANK, NODE], log, [fired(RANK, 9, 1), fired(NODE, 19, 2)]) == []


@pytest.mark.parametrize(
    "what",
    [
        {"kind": "rank_error", "rank": 3},  # another kind
        {"kind": "rank_killed", "rank": 2},  # another rank
        {"kind": "secondary", "rank": 3},
        {"kind": "node_lost", "node": "b"},
    ],
)
def test_any_failure_will_not_do(what: dict[str, Any]) -> None:
    assert unproven([RANK], fall(1, 10, **what), [fired(RANK, 9, 1)]) == [RANK]


def test_a_failure_of_another_node_or_attempt_will_not_do() -> None:
    assert unproven([NODE], fall(1, 10, "node_lost", node="a"), [fired(NODE, 9, 1)]) == [NODE]
    assert unproven([NODE], fall(2, 10, "node_lost", node="b"), [fired(NODE, 9, 1)]) == [NODE]
    assert unproven([NODE], fall(1, 10, "node_lost", node="b"), [fired(NODE, 99, 1)]) == [NODE]


def test_the_cause_found_afterwards_counts() -> None:
    """The first to be seen was a peer that lost its connection."""
    log = fall(1, 10, "secondary", rank=0, node="a")
    log[2] = event(EventKind.GANG_STOPPED, 11, 1, cause="node b was lost: closed", failure="node_lost")
    assert unproven([NODE], log, [fired(NODE, 9, 1)]) == []
    log[2] = event(EventKind.GANG_STOPPED, 11, 1, cause="rank 3 on b was ended by signal 9", failure="rank_killed")
    assert unproven([RANK], log, [fired(RANK, 9, 1)]) == []
    assert unproven(["rank_kill@rank=33,step=5"], log, [fired("rank_kill@rank=33,step=5", 9, 1)]) != []


def test_one_failure_does_not_prove_two_faults() -> None:
    """The second says that it fired in the second attempt, and that attempt did not fall."""
    log = fall(1, 10, "rank_killed", rank=3)
    twice = [fired(RANK, 9, 1), fired(RANK, 19, 2, number=1)]
    assert unproven([RANK, RANK], log, twice) == [RANK]


def test_faults_that_fell_a_gang_together_share_its_failure() -> None:
    log = fall(1, 10, "node_lost", node="b")
    assert unproven([RANK, NODE], log, [fired(RANK, 9.0, 1), fired(NODE, 9.1, 1)]) == []
    assert unproven([RANK, NODE], log, [fired(RANK, 9.0, 1)]) == [RANK, NODE]


@pytest.mark.parametrize(
    ("rank", "step", "attempt", "proven"),
    [(3, 5, 1, True), (3, 60, 1, True), (2, 9, 1, False), (3, 4, 1, False), (3, 9, 2, False)],
)
def test_a_slow_rank_is_proven_by_its_name(rank: int, step: int, attempt: int, proven: bool) -> None:
    """Not by that of another, nor before it was slow, nor in an attempt in which it was not."""
    fault = "rank_slow@rank=3,step=5"
    log = [event(EventKind.STRAGGLER_FOUND, 10, attempt, failure={"kind": "straggler", "rank": rank, "step": step})]
    assert (unproven([fault], log, [fired(fault, 9, 1)]) == []) is proven


@pytest.mark.parametrize("fault", ["nan_grad@rank=3,step=5", "loss_spike@rank=3,step=5", "bad_update@rank=3,step=4"])
def test_spoiled_numbers_are_everybodys(fault: str) -> None:
    """No rank can tell which of them it was: the step proves it."""
    failure = {"kind": "numeric", "rank": 0, "node": "a", "step": 5}
    cause = {"cause": "training blew up at step 5: the loss is nan", "failure": "numeric"}

    def proven(failure: dict[str, Any], cause: dict[str, Any]) -> bool:
        log = fall(1, 10, "numeric")
        log[1:] = [
            event(EventKind.FAILURE_DETECTED, 10, 1, failure=failure),
            event(EventKind.GANG_STOPPED, 11, 1, **cause),
        ]
        return unproven([fault], log, [fired(fault, 9, 1)]) == []

    other = {"cause": "training blew up at step 55: the loss is nan", "failure": "numeric"}
    assert proven(failure, other)
    assert proven({"kind": "node_lost", "node": "b", "step": 0}, cause)  # found afterwards
    assert not proven(failure | {"step": 6}, other)
    assert not proven(failure | {"kind": "rank_error"}, cause | {"failure": "rank_error"})
