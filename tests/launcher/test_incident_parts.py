"""Parts of what an incident has cost: the end of the old ranks, and what the new ones did until they trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.account import CLASSES, PARTS, Incident
from launcher.ledger import account, ledger
from launcher.run import EventKind, RunEvent
from tests.support.histories import Story, log

Line = tuple[float, EventKind, int, dict[str, Any]]
TOLD = {"device_s": 0.25, "communicators_s": 1.0, "engine_s": 0.5, "restored_s": 0.125}
NAMED = {"device": 0.25, "communicators": 1.0, "engine": 0.5, "state": 0.125}


def story(*, told: dict[str, Any] = TOLD, again: bool = False, restored_s: float = 3.0) -> list[RunEvent]:
    """A node is lost, the old ranks are gone 1.5 s later; ``again``: a failure comes before the new ones train."""
    first: list[Line] = [
        (0.0, EventKind.RUN_SUBMITTED, 0, {}),
        (1.0, EventKind.ATTEMPT_PLANNED, 1, {"reason": "start", "first_step": 1}),
        (2.0, EventKind.RANKS_SPAWNED, 1, {"resume_from": ""}),
        (3.0, EventKind.TRAINING_STARTED, 1, {"step": 1, **TOLD}),
        (10.0, EventKind.FAILURE_DETECTED, 1, {"failed_at": 9.0, "failure": {"kind": "node_lost"}}),
        (11.5, EventKind.GANG_STOPPED, 1, {"failure": "node_lost", "cause": "n"}),
        (11.75, EventKind.DECISION, 1, {"delay_s": 0, "action": "restart"}),
        (12.0, EventKind.ATTEMPT_PLANNED, 2, {"reason": "restart", "first_step": 1}),
        (13.0, EventKind.RANKS_SPAWNED, 2, {"resume_from": "x"}),
    ]
    failed_again: list[Line] = [
        (15.0, EventKind.FAILURE_DETECTED, 2, {"failed_at": 14.5, "failure": {"kind": "rank_error"}}),
        (15.75, EventKind.GANG_STOPPED, 2, {"failure": "rank_error", "cause": "r"}),
        (15.75, EventKind.DECISION, 2, {"delay_s": 0, "action": "restart"}),
        (16.0, EventKind.ATTEMPT_PLANNED, 3, {"reason": "restart", "first_step": 1}),
        (17.0, EventKind.RANKS_SPAWNED, 3, {"resume_from": "x"}),
    ]
    begins = 13.0 + 4.0 * again
    last: Line = (begins + restored_s, EventKind.TRAINING_STARTED, 2 + again, {"step": 1, **told})
    return log(*first, *failed_again * again, last)


def incidents(events: list[RunEvent]) -> list[Incident]:
    return list(account(events, [], events[-1].time).incidents)


def test_an_incident_names_its_parts() -> None:
    (one,) = incidents(story())
    assert one.parts == pytest.approx({"teardown": 1.5, **NAMED})
    assert (one.seconds["decide"], one.seconds["restore"]) == pytest.approx((1.75, 3.0))
    assert one.unnamed_s("decide") == pytest.approx(0.25), "the decision itself"
    assert one.unnamed_s("restore") == pytest.approx(3.0 - 1.875)
    assert one.unnamed_s("place") == one.seconds["place"]


def test_parts_move_no_second() -> None:
    events = story()
    named = ledger(events, [], now=20.0)
    assert named == ledger(story(told={}), [], now=20.0)
    assert sum(named[name] for name in CLASSES) == pytest.approx(20.0)
    assert incidents(events)[0].total_s == pytest.approx(incidents(story(told={}))[0].total_s)


def test_ranks_that_have_told_nothing_leave_their_restore_without_a_name() -> None:
    (one,) = incidents(story(told={}))
    assert one.parts == {"teardown": 1.5}
    assert one.unnamed_s("restore") == one.seconds["restore"] == 3.0
    (one,) = incidents(story(told={"restored_s": 0.5, "device_s": None}))
    assert one.parts == {"teardown": 1.5, "state": 0.5}, "as of a log that is older than the others"


def test_no_part_is_longer_than_what_it_is_of() -> None:
    """Ranks of a node that came first had begun before all ranks existed: all are shortened alike."""
    (one,) = incidents(story(restored_s=1.5))
    assert one.parts == pytest.approx({"teardown": 1.5, **{part: 0.8 * seconds for part, seconds in NAMED.items()}})
    assert one.unnamed_s("restore") == pytest.approx(0.0)
    (one,) = incidents(story(told={"device_s": 99.0, "restored_s": -1.0}))
    assert one.parts == pytest.approx({"teardown": 1.5, "device": 3.0, "state": 0.0})
    (one,) = incidents(story(told={"device_s": 99.0, "engine_s": 1.0}))
    assert one.parts == pytest.approx({"teardown": 1.5, "device": 2.25, "engine": 0.75}), "one hides no other"
    (one,) = incidents(story(restored_s=0.0))
    assert one.parts == pytest.approx({"teardown": 1.5, **dict.fromkeys(NAMED, 0.0)})


def test_a_failure_during_the_recovery_has_parts_of_its_own() -> None:
    """What the ranks that fell had told nobody knows; what trains at last belongs to the failure it followed."""
    first, second = incidents(story(again=True))
    assert first.parts == pytest.approx({"teardown": 1.5})
    assert first.seconds["restore"] == first.unnamed_s("restore") == pytest.approx(1.5)
    assert second.parts == pytest.approx({"teardown": 0.75, **NAMED})


def test_a_first_start_and_ranks_that_leave_are_no_incident() -> None:
    events = story()[:4] + log(
        (10.0, EventKind.GANG_STOPPED, 1, {"failure": "", "last_step": 2}),
        (11.0, EventKind.ATTEMPT_PLANNED, 2, {"reason": "grow", "first_step": 3}),
        (12.0, EventKind.RANKS_SPAWNED, 2, {"resume_from": "x"}),
        (13.0, EventKind.TRAINING_STARTED, 2, {"step": 3, **TOLD}),
    )
    assert incidents(events) == []


def test_the_end_of_the_ranks_goes_on_while_no_controller_looks() -> None:
    """One falls after it has told of the failure; its successor finds ranks that still die, or that they are gone."""
    before, after = story()[:5], story()[6:]
    found = log((12.0, EventKind.FAILURE_DETECTED, 1, {"failure": {"kind": "orphaned"}}))
    stopped = log((14.0, EventKind.GANG_STOPPED, 1, {"failure": "node_lost", "cause": "n"}))
    (one,) = incidents([*before, *found, *stopped])
    assert one.parts == {"teardown": 4.0}
    assert one.seconds["decide"] == 4.0
    later = [dataclasses.replace(event, time=event.time + 3.0) for event in after]
    (one,) = incidents([*before, *stopped, *later])
    assert one.parts == pytest.approx({"teardown": 4.0, **NAMED})


def test_of_a_gang_whose_end_is_recorded_nothing_more_is_teardown() -> None:
    events = story()[:6] + log((15.0, EventKind.FAILURE_DETECTED, 1, {"failure": {"kind": "orphaned"}}))
    (one,) = incidents(events)
    assert one.parts == {"teardown": 1.5}
    assert one.seconds["decide"] == 5.0


def test_random_histories_have_every_part() -> None:
    """That none is ever more than its class holds of all of them (tests.support.histories.check, in test_ledger)."""
    seen: set[str] = set()
    for seed in range(100):
        events = Story(seed).events
        seen |= {part for one in incidents(events) for part, seconds in one.parts.items() if seconds > 0}
    assert seen == set(PARTS)
