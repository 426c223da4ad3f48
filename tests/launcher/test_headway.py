"""Whether a run gets anywhere: what is progress after a fall-back, and that falling back for ever is none."""

from __future__ import annotations

from typing import Any

from launcher.headway import Headway
from launcher.policy import decide
from launcher.recovery import Action, Decision, Failure, FailureKind
from launcher.request import RecoverySpec
from launcher.run import EventKind, Run, RunEvent, fold

HALF_AN_HOUR_S = 1800.0  # so that no budget within an hour stands in for what is tested


class Story:
    """A log that is written event by event."""

    def __init__(self) -> None:
        self.events: list[RunEvent] = []
        self.attempt = 0
        self.time = 0.0
        self.add(EventKind.RUN_SUBMITTED)

    def add(self, kind: EventKind, **data: Any) -> None:
        self.events.append(
            RunEvent(seq=len(self.events) + 1, time=self.time, epoch=1, attempt=self.attempt, kind=kind, data=data)
        )

    def plan(self, point: int, reason: str = "restart", source: str = "/run/manifest.json") -> None:
        self.attempt += 1
        fields = {"plan": {}, "nodes": ["a"], "resume_from": source if point else "", "first_step": point + 1}
        self.add(EventKind.ATTEMPT_PLANNED, reason=reason, **fields)
        self.add(EventKind.TRAINING_STARTED, step=point + 1)

    def commit(self, *steps: int) -> None:
        for step in steps:
            self.add(EventKind.CHECKPOINT_COMMITTED, step=step)

    def fall(self, last: int) -> Decision:
        self.time += HALF_AN_HOUR_S
        cause = {"cause": "node lost", "failure": "node_lost", "node": f"n{self.attempt}", "signature": ""}
        self.add(EventKind.GANG_STOPPED, last_step=last, **cause)
        failure = Failure(kind=FailureKind.NODE_LOST, time=self.time, detail="node lost")
        return decide(self.run, failure, RecoverySpec())

    @property
    def run(self) -> Run:
        return fold(self.events)


def fallen_back() -> Story:
    """20,010 steps were done; the checkpoints after step 15,000 turn out to be damaged."""
    story = Story()
    story.plan(0, "start")
    story.commit(15_000, 20_000)
    story.fall(20_010)
    story.add(EventKind.CHECKPOINT_REJECTED, path="/run/20000", reason="a flipped bit")
    story.plan(15_000)
    return story


def test_after_a_fall_back_every_newer_checkpoint_is_progress() -> None:
    story, step = fallen_back(), 15_000
    assert story.run.committed_step == 15_000
    for _ in range(30):  # 30 failures, half an hour apart, 400 steps between them
        step += 400
        story.commit(step)
        decision = story.fall(step + 10)
        assert decision.action is Action.RESTART
        assert decision.delay_s == 0.0
        assert story.run.committed_step == step
        story.plan(step)
    assert step > 20_010


def test_after_a_fall_back_to_memory_a_newer_step_is_progress() -> None:
    story = Story()
    story.plan(0, "start")
    story.commit(20)
    story.fall(25)
    story.plan(15, source="memory:15:e0001-a0001")
    assert story.run.committed_step == 15
    assert story.fall(17).delay_s == 0.0
    assert story.run.headway == Headway(committed_step=15, best_step=25, mark=17, fall_backs=1)


def test_the_same_steps_after_a_fall_back_are_none() -> None:
    story = fallen_back()
    decisions = []
    for _ in range(8):
        decisions.append(story.fall(15_200))
        story.plan(15_000)
    assert [one.action for one in decisions] == [Action.RESTART] * 8
    last = story.fall(15_200)
    assert last.action is Action.GIVE_UP
    assert "no step beyond 15200" in last.reason


def test_who_falls_back_again_and_again_ends() -> None:
    """Each time something is committed, and each time that is damaged: a budget of an hour would never see it."""
    story = fallen_back()
    for number in range(1, 100):
        story.commit(15_400)
        decision = story.fall(15_410)
        if decision.action is Action.GIVE_UP:
            break
        story.add(EventKind.CHECKPOINT_REJECTED, path=f"/run/15400-{number}", reason="a flipped bit")
        story.plan(15_000)
    assert number == RecoverySpec().no_progress_limit
    assert "it fell back to an older checkpoint 8 times and came to no step beyond 20010" in decision.reason


def test_a_step_that_is_the_highest_of_all_makes_fall_backs_forgotten_and_so_does_a_person() -> None:
    story = fallen_back()
    assert story.run.headway.fall_backs == 1
    story.fall(20_011)
    assert story.run.headway.fall_backs == 0
    other = fallen_back()
    other.fall(15_200)
    other.add(EventKind.RESUME_REQUESTED)
    assert other.run.headway == Headway(committed_step=15_000, best_step=20_010, mark=15_200)


def test_without_a_fall_back_the_yardstick_is_the_highest_step_of_all() -> None:
    """It gets from 10 to 12 every time: that is not progress, although 11 and 12 are beyond what was gone on from."""
    story = Story()
    story.plan(0, "start")
    story.commit(10)
    for _ in range(8):
        assert story.fall(12).action is Action.RESTART
        story.plan(10)
    assert story.fall(12).action is Action.GIVE_UP


def test_a_checkpoint_that_is_back_counts_again() -> None:
    story = fallen_back()
    story.fall(15_010)
    story.add(EventKind.RESUME_REQUESTED)
    story.plan(20_000, "resume")
    assert story.run.committed_step == 20_000
    story.commit(20_400)
    assert story.fall(20_410).action is Action.RESTART
