"""A gang that begins while the store of the checkpoints does not answer: what it owes, and what counts in the end."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from jobs.checkpoint import CheckpointConflict, fence, list_checkpoints, manifest
from jobs.checkpoint.claim import claim
from jobs.checkpoint.errors import Unsaved
from jobs.checkpoint.fence import Branch, Debt
from jobs.checkpoint.layout import Token
from jobs.checkpoint.storage import PosixStorage
from jobs.location import Location
from launcher import adoption, origin
from launcher.errand import Errand, Silent
from launcher.gang import Gang
from launcher.logbook import Fenced
from launcher.outset import Outset
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from launcher.store import dump
from strategies.codec import from_json
from strategies.errors import ResumeRefused, StorageError
from tests.launcher.test_fencing import a_rank_falls_in, begins, cut_off
from tests.launcher.test_origin import a_node_is_lost, hold, killed, trained
from tests.launcher.test_takeover import Live
from tests.support.checkpoints import write_checkpoint
from tests.support.stage import Stage

FENCE = EventKind.FENCE_LAID


class Outage:
    """Of every storage: calls fail, or wait until it is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over = threading.Event()
        self.over.set()
        self.fails = False
        for name in ("create", "read", "names", "sizes", "size"):
            self._wrap(monkeypatch, name, getattr(PosixStorage, name))

    def begin(self, *, fails: bool = True) -> None:
        """Calls fail from now on; or wait."""
        self.fails = fails
        self.over.clear()

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, name: str, real: Callable[..., Any]) -> None:
        def call(*arguments: Any) -> Any:
            if self.fails and not self.over.is_set():
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            assert self.over.wait(30)
            return real(*arguments)

        monkeypatch.setattr(PosixStorage, name, call)


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outage]:
    found = Outage(monkeypatch)
    yield found
    found.over.set()


def impatient(stage: Stage, *, pay_every_s: float = 1e9, answer_s: float = 0.5) -> None:
    """The controller does not wait long for the store; how often it tries to pay, never unless told otherwise."""
    memory = stage.controller.memory
    stage.controller.outset = Outset(stage.store, memory, answer_s=answer_s, pay_every_s=pay_every_s)


def owed(stage: Stage, attempt: int = 2) -> Debt:
    return from_json(Debt, json.loads(stage.store.paths.debt(attempt).read_text()))


def until_laid(stage: Stage) -> None:
    for _ in range(200):
        stage.turn()
        if FENCE in stage.kinds():
            return
        threading.Event().wait(0.02)
    raise AssertionError("the fence was never laid")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("end", [a_node_is_lost, lambda stage: a_rank_falls_in(stage, 1)])
def test_an_outage_of_the_store_holds_up_no_recovery_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage, end: Callable[[Stage], None], fails: bool
) -> None:
    stage, _ = trained(tmp_path)
    root = stage.store.paths.checkpoint_dir
    late, beyond = cut_off(stage, 11), cut_off(stage, 13)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage, pay_every_s=0.05)
    outage.begin(fails=fails)
    end(stage)
    assert stage.controller.phase is Phase.RUN
    assert begins(stage) == ["", "memory:12:e0001-a0001"]
    planned = [e for e in stage.store.events() if e.kind is EventKind.ATTEMPT_PLANNED][-1]
    assert ("Connection timed out" if fails else "has not answered") in planned.data["unfenced"]
    assert FENCE not in stage.kinds()
    assert not [e for e in stage.store.events() if e.data.get("action") == "wait"]
    outage.over.set()
    until_laid(stage)
    assert fence.highest(root) == Token(1, 2)
    assert fence.current(root) == owed(stage).branch
    for commit in (late, beyond):  # one of them is history, and of its gang no node was cut off
        if commit is late and end is not a_node_is_lost:
            commit()
            continue
        with pytest.raises(CheckpointConflict):
            commit()
    stage.turn(3)
    assert stage.kinds().count(FENCE) == 1


def test_what_the_old_gang_commits_meanwhile_counts_as_far_as_it_is_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage
) -> None:
    """Its own node sees the store, and the controller does not; the new gang's first commit lays the fence."""
    stage, _ = trained(tmp_path)
    root = stage.store.paths.checkpoint_dir
    late, beyond = cut_off(stage, 11), cut_off(stage, 13)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage)
    outage.begin()
    a_node_is_lost(stage)
    outage.over.set()
    late()
    beyond()
    assert [one.step for one in list_checkpoints(root)] == [13, 11, 10, 5], "nothing tells them apart yet"
    fence.pay(root, owed(stage))
    assert [one.step for one in list_checkpoints(root)] == [11, 10, 5]
    write_checkpoint(root, 15, (1, 2))
    fence.pay(root, owed(stage))  # again, as every commit does
    assert [one.step for one in list_checkpoints(root)] == [15, 11, 10, 5]
    monkeypatch.setattr(stage.gang, "ask_holdings", lambda number: set())
    stage.gang.say("exit", "c", rank=3, attempt=2, code=None, signal=9)
    killed(stage, "a", "c", attempt=2)
    stage.turn(4)
    assert begins(stage)[-1].endswith("step-00000015/e0001-a0002.manifest.json")


def test_a_gang_that_was_replaced_before_it_could_pay_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage
) -> None:
    """Nor does its fence count against its successor, which began with what the one before had."""
    stage, _ = trained(tmp_path)
    root = stage.store.paths.checkpoint_dir
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage)
    outage.begin()
    a_rank_falls_in(stage, 1)
    outage.over.set()
    a_rank_falls_in(stage, 2)
    assert [one.number for one in stage.store.run().attempts] == [1, 2, 3]
    assert fence.highest(root) == Token(1, 3)
    with pytest.raises(CheckpointConflict):
        fence.pay(root, owed(stage))
    monkeypatch.setattr(manifest, "refuse_if_fenced", lambda place: None)
    write_checkpoint(root, 14, (1, 2))
    assert [one.step for one in list_checkpoints(root)] == [10, 5]


def test_what_is_known_to_be_newer_on_disk_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage
) -> None:
    stage, (_, newest) = trained(tmp_path)
    hold(stage, monkeypatch, step=9, attempt=1)
    impatient(stage)
    outage.begin(fails=False)
    a_node_is_lost(stage)
    assert stage.state() is RunState.RECOVERING
    (wait,) = [e.data["reason"] for e in stage.store.events() if e.data.get("action") == "wait"]
    assert wait.startswith("the store of the checkpoints has not answered")
    outage.over.set()
    for _ in range(100):
        stage.turn()
        if len(begins(stage)) == 2:
            break
        threading.Event().wait(0.02)
    assert begins(stage)[1:] == [str(newest)]


def a_rank_ends_with(stage: Stage, code: int, **error: Any) -> None:
    if error:
        stage.report("b", "error", 1, rank=3, traceback="t", **error)
    stage.gang.say("exit", "b", rank=3, attempt=1, code=code, signal=None, log_tail="")
    killed(stage, "a", "b")
    stage.turn(4)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (7, {"type": "StorageError", "message": "The persister of this node does not do its work.", "step": 13}),
        (1, {"type": "ZeroDivisionError", "message": "division by zero", "step": 13}),
        (1, {}),
    ],
)
def test_a_rank_that_falls_by_itself_gives_up_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage, code: int, error: dict[str, Any]
) -> None:
    """Its persister has died, or the code is wrong: not that it could not save."""
    stage, _ = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage)
    outage.begin()
    stage.report("a", "unsaved", 1, rank=0, step=12, reason="Cannot write the checkpoint shard.")
    a_rank_ends_with(stage, code, **error)
    assert begins(stage)[1:] == ["memory:12:e0001-a0001"]


def test_ranks_that_could_not_save_the_end_are_not_started_again_before_the_store_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage
) -> None:
    """They would come to the same step and fail there alike, and that is the end of a run."""
    stage, _ = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage)
    outage.begin()
    a_rank_ends_with(stage, 7, type=Unsaved.__name__, message="Cannot write the checkpoint shard.", step=20)
    assert stage.store.run().failures[-1].kind == "unsaved"
    assert len(begins(stage)) == 1
    assert [e.data["action"] for e in stage.store.events() if e.kind is EventKind.DECISION] == ["restart", "wait"]
    outage.over.set()
    stage.turn(2)
    assert begins(stage)[1:] == ["memory:12:e0001-a0001"]
    assert fence.highest(stage.store.paths.checkpoint_dir) == Token(1, 2)


def test_a_long_wait_is_told_again_but_less_and_less_often_and_ends_when_it_was_set_to(
    tmp_path: Path, outage: Outage
) -> None:
    stage, _ = trained(tmp_path, wait_for_nodes_s=1000.0)
    impatient(stage, answer_s=0.02)
    outage.begin(fails=False)
    a_node_is_lost(stage)
    for _ in range(90):
        stage.clock.now += 10.0
        stage.turn()
    told = [e for e in stage.store.events() if e.data.get("action") == "wait"]
    assert 4 <= len(told) <= 6
    assert stage.state() is RunState.RECOVERING
    stage.clock.now += 100.0
    stage.turn()
    assert stage.state() is RunState.FAILED
    assert "has not answered for" in stage.store.run().reason


def test_what_may_be_on_record_is_not_decided_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has taken the record and has not said so; meanwhile a better checkpoint has come up."""
    stage, (_, newest) = trained(tmp_path)
    impatient(stage)
    root, over, real = stage.store.paths.checkpoint_dir, threading.Event(), origin.lay_down

    def stuck(*arguments: Any) -> None:
        real(*arguments)
        assert over.wait(30)

    monkeypatch.setattr(origin, "lay_down", stuck)
    a_node_is_lost(stage)
    assert len(begins(stage)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "refuse_if_fenced", lambda place: None)
        cut_off(stage, 12)()
    over.set()
    for _ in range(100):
        stage.turn()
        if len(begins(stage)) == 2:
            break
        threading.Event().wait(0.02)
    assert begins(stage)[1:] == [str(newest)]
    assert fence.current(root) is not None


def test_who_was_replaced_meanwhile_learns_it_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage
) -> None:
    stage, _ = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage, pay_every_s=0.5)
    outage.begin()
    a_rank_falls_in(stage, 1)
    outage.over.set()
    fence.raise_fence(stage.store.paths.checkpoints, Token(2, 3), owner="a later controller")
    with pytest.raises(Fenced):
        until_laid(stage)


def test_what_a_predecessor_would_have_owed_is_not_owed_by_the_gang_that_comes_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage
) -> None:
    """It fell before the attempt was on record; then the store answers, and the same number has another epoch."""
    stage, _ = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage)
    outage.begin()
    record = stage.controller.record

    def fall(kind: EventKind, **data: Any) -> None:
        if kind is EventKind.ATTEMPT_PLANNED:
            raise KeyboardInterrupt
        record(kind, **data)

    monkeypatch.setattr(stage.controller, "record", fall)
    with pytest.raises(KeyboardInterrupt):
        a_rank_falls_in(stage, 1)
    debt, path = owed(stage), stage.store.paths.debt(2)
    assert debt.branch.token == Token(1, 2)
    outage.over.set()
    stage.lock.release()
    stage.renew()
    adoption.begin(stage.controller)
    hold(stage, monkeypatch, step=12, attempt=1)
    stage.turn(4)
    assert begins(stage)[1:] == ["memory:12:e0001-a0001"]
    assert fence.highest(stage.store.paths.checkpoint_dir) == Token(2, 2)
    assert not path.exists()


def test_a_gang_owes_only_what_is_its_own(tmp_path: Path) -> None:
    path, debt = tmp_path / "debt.json", Debt(owner="me", branch=Branch(epoch=1, attempt=2))
    assert fence.owed(path, Token(1, 2)) is None
    path.write_bytes(dump(debt))
    assert fence.owed(path, Token(1, 2)) == debt
    assert fence.owed(path, Token(2, 2)) is None
    path.write_text('{"owner": 1}')
    with pytest.raises(StorageError, match=r"debt\.json cannot be read"):
        fence.owed(path, Token(1, 2))


class LiveSecond(Live):
    """Agents that hold the second attempt."""

    held = 2


@pytest.mark.parametrize("laid", [False, True])
def test_who_takes_a_gang_over_pays_what_it_owes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outage: Outage, laid: bool
) -> None:
    stage, _ = trained(tmp_path)
    hold(stage, monkeypatch, step=12, attempt=1)
    impatient(stage, pay_every_s=0.05 if laid else 1e9)
    outage.begin()
    a_rank_falls_in(stage, 1)
    stage.start()
    stage.store.write_ranks(2, [{"node": "ab"[rank // 2], "rank": rank, "pid": 100 + rank} for rank in range(4)])
    if laid:
        outage.over.set()
        until_laid(stage)
    stage.lock.release()
    stage.renew()
    stage.gang = LiveSecond(stage.clock)
    stage.controller.gang = cast(Gang, stage.gang)
    impatient(stage, pay_every_s=0.05)
    adoption.begin(stage.controller)
    assert stage.controller.phase is Phase.RUN
    stage.turn(2)
    assert (FENCE in stage.kinds()) is laid
    outage.over.set()
    until_laid(stage)
    for _ in range(10):
        stage.turn()
        threading.Event().wait(0.02)
    assert stage.kinds().count(FENCE) == 1
    assert fence.current(stage.store.paths.checkpoint_dir) == owed(stage).branch
    assert len(begins(stage)) == 2


def test_the_patience_with_a_store_begins_when_it_is_asked(tmp_path: Path, outage: Outage) -> None:
    """Before that there were no nodes; and in between there are none again."""
    stage, _ = trained(tmp_path, nodes=("a", "b"), spares=0, wait_for_nodes_s=300.0, min_nodes=2)
    impatient(stage, answer_s=0.02)
    outage.begin(fails=False)
    a_node_is_lost(stage)
    stage.clock.now += 290.0
    stage.turn()
    assert EventKind.WAITING_FOR_NODES in stage.kinds()
    stage.backend.alive["b"] = "b-1"
    stage.turn(4)
    stage.clock.now += 290.0
    stage.turn()
    assert stage.state() is RunState.RECOVERING
    told = [e.data["reason"] for e in stage.store.events() if e.data.get("action") == "wait"]
    assert "has not answered for" in told[-1]
    stage.clock.now += 20.0
    stage.turn()
    assert stage.state() is RunState.FAILED
    assert "has not answered for" in stage.store.run().reason


def test_nothing_is_laid_among_the_checkpoints_of_another_run(tmp_path: Path) -> None:
    root: Location = tmp_path / "shared"
    claim(root, run="other", owner="somebody else")
    debt = Debt(owner="me", branch=Branch(epoch=1, attempt=2), claim={"run": "run", "owner": "mine"})
    with pytest.raises(ResumeRefused, match="another run"):
        fence.pay(root, debt)
    assert fence.highest(root) is None


def test_an_errand_keeps_nobody_waiting() -> None:
    errand, over = Errand(), threading.Event()
    for question in (1, 1, 2):
        with pytest.raises(Silent, match="has not answered for 0 s"):
            errand.run(question, lambda: over.wait(30) and "one", 0.05)
    over.set()
    while errand.busy:
        threading.Event().wait(0.01)
    assert errand.run(1, lambda: "again", 30) == "one", "it was asked once, and has answered late"
    assert errand.run(1, lambda: "again", 30) == "again"
    with pytest.raises(ZeroDivisionError):
        errand.run(1, lambda: 1 // 0, 30)
    assert errand.run(1, lambda: 3, 30) == 3, "what fails at once may be tried at once"


def test_the_late_answer_to_one_question_is_not_that_to_another() -> None:
    errand, over = Errand(), threading.Event()
    with pytest.raises(Silent):
        errand.run(1, lambda: over.wait(30), 0.05)
    over.set()
    while errand.busy:
        threading.Event().wait(0.01)
    assert errand.run(2, lambda: "two", 30) == "two"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_store_that_is_always_slow_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    stage, (_, newest) = trained(tmp_path)
    if resumed:
        stage.lock.release()
        stage.renew()
    stage.controller.outset = Outset(stage.store, stage.controller.memory, answer_s=0.05)
    real, looks = origin.look, []

    def slow(*arguments: Any, **options: Any) -> Any:
        looks.append(1)
        threading.Event().wait(0.3)
        return real(*arguments, **options)

    monkeypatch.setattr(origin, "look", slow)
    if resumed:
        adoption.begin(stage.controller, resume={"overrides": [], "changes": []})
    else:
        a_node_is_lost(stage)
    for _ in range(40):
        if len(begins(stage)) == 2:
            break
        stage.turn()
    assert begins(stage)[1:] == [str(newest)]
    assert len(looks) == 1
