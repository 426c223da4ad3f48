"""Ranks that leave in good order: asked by a controller that a test steps by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.orders import OrderBook, Orders
from launcher import adoption
from launcher.departure import ELSEWHERE
from launcher.phase import Phase
from launcher.run import EventKind, RunState
from tests.support.checkpoints import write_checkpoint
from tests.support.stage import Stage

BOTH = ("a", "b")


def steps(stage: Stage, attempt: int, first: int, last: int, *, slow: int = -1, nodes: tuple[str, str] = BOTH) -> None:
    """Every rank completes these steps."""
    for step in range(first, last + 1):
        for rank in range(4):
            own = {"own_s": 0.15 if rank == slow else 0.1, "seconds": 0.2}
            stage.report(nodes[rank // 2], "step", attempt, rank=rank, step=step, next="step", **own)
        stage.turn()


def leave(stage: Stage, attempt: int, nodes: tuple[str, str] = BOTH) -> None:
    """Every rank exits as asked."""
    for rank in range(4):
        stage.gang.say("exit", nodes[rank // 2], rank=rank, attempt=attempt, code=0, signal=None)
    stage.turn()


def decisions(stage: Stage) -> list[dict[str, Any]]:
    return [dict(event.data) for event in stage.store.events() if event.kind is EventKind.DECISION]


def orders(stage: Stage) -> list[tuple[Any, ...]]:
    return [call for call in stage.gang.calls if call[0] == "leave"]


def test_a_notice_lets_all_ranks_leave_after_the_same_step(tmp_path: Path) -> None:
    stage = Stage(tmp_path, no_progress_limit=1)
    stage.start()
    steps(stage, 1, 1, 7)
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    (order,) = orders(stage)
    assert order == ("leave", 1, 7 + 2 + 5)  # steps of 0.2 s: a second for the order, and two steps
    assert stage.state() is RunState.RUNNING
    assert (
        "node b will be taken away in 25 s (SIGTERM): all ranks save and leave after step 14"
        in (decisions(stage)[0]["reason"])
    )
    steps(stage, 1, 8, 14)
    assert len(orders(stage)) == 1
    path = write_checkpoint(stage.store.paths.checkpoint_dir, 14)
    stage.report("a", "checkpoint", 1, rank=0, step=14, path=str(path))
    leave(stage, 1)
    stage.gang.say("leaving", "b", reason="SIGTERM")
    stage.gang.say("killed", "a", attempt=1)
    stage.turn()
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "c": [2, 3]}) in stage.gang.calls
    run = stage.store.run()
    assert [attempt.reason for attempt in run.attempts] == ["start", "move"]
    assert run.attempts[0].cause == ELSEWHERE
    assert (run.restarts, run.steps_lost, run.failures) == (0, 0, ())
    assert [decision["action"] for decision in decisions(stage)] == ["leave", "swap"]
    assert EventKind.FAILURE_DETECTED not in stage.kinds()


def test_an_order_that_came_too_late_is_given_anew(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    steps(stage, 1, 1, 2)
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    assert orders(stage) == [("leave", 1, 4)]
    steps(stage, 1, 3, 4)
    assert len(orders(stage)) == 1  # they may be leaving
    steps(stage, 1, 5, 5)
    assert orders(stage)[1][2] > 5
    assert len(decisions(stage)) == 1


def test_a_deadline_that_passes_is_a_failure_that_costs_no_budget(tmp_path: Path) -> None:
    stage = Stage(tmp_path, max_restarts=0)
    stage.start()
    steps(stage, 1, 1, 3)
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=2.0)
    stage.turn()
    stage.gang.say("leaving", "b", reason="SIGTERM")
    stage.gang.say("killed", "a", attempt=1)
    stage.turn(2)
    stage.start()
    run = stage.store.run()
    assert [attempt.reason for attempt in run.attempts] == ["start", "move"]
    assert run.failures[0].kind == "preempted"
    assert (run.restarts, run.state) == (0, RunState.RUNNING)


def test_a_notice_before_the_first_step_moves_the_gang_at_once(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.turn(2)
    stage.gang.say("notice", "a", reason="SIGTERM", within_s=25.0)
    stage.turn()
    assert stage.controller.phase is Phase.STOP
    for node in BOTH:
        stage.gang.say("killed", node, attempt=1)
    stage.start()
    assert ("spawn", 2, {"c": [0, 1], "b": [2, 3]}) in stage.gang.calls
    assert stage.backend.alive.keys() == {"a", "b", "c"}  # told to go, and not killed by us


def test_near_the_end_nobody_is_asked(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.start()
    steps(stage, 1, 1, 18)
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    assert orders(stage) == []
    steps(stage, 1, 19, 20)
    leave(stage, 1)
    assert stage.state() is RunState.SUCCEEDED


@pytest.mark.parametrize("replace_stragglers", [False, True])
def test_a_slow_rank_is_on_record_and_replaced_if_wished(tmp_path: Path, replace_stragglers: bool) -> None:
    stage = Stage(tmp_path, replace_stragglers=replace_stragglers, steps=30)
    stage.start()
    stage.gang.say("pool", "c", state="ready", reason="")
    steps(stage, 1, 1, 19, slow=2)
    (found,) = [event.data for event in stage.store.events() if event.kind is EventKind.STRAGGLER_FOUND]
    assert found["ratio"] == 1.5
    assert "rank 2 on b (pipe 1, data 0, model 0) takes 1.50x" in found["failure"]["detail"]
    assert stage.store.paths.leave(1).exists() is replace_stragglers
    if not replace_stragglers:
        assert decisions(stage) == []
        return
    leave(stage, 1)
    for node in BOTH:
        stage.gang.say("killed", node, attempt=1)
    stage.turn()
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "c": [2, 3]}) in stage.gang.calls
    assert [decision["action"] for decision in decisions(stage)] == ["replace", "swap"]
    run = stage.store.run()
    assert (list(run.excluded), run.restarts) == (["b"], 0)


def test_without_a_spare_a_slow_rank_stays(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=BOTH, replace_stragglers=True)
    stage.start()
    steps(stage, 1, 1, 19, slow=2)
    assert EventKind.STRAGGLER_FOUND in stage.kinds()
    assert not stage.store.paths.leave(1).exists()


def test_a_node_that_fails_again_and_again_carries_no_ranks(tmp_path: Path) -> None:
    stage = Stage(tmp_path, backoff_s=0.0, exclude_after=2)
    for attempt in (1, 2):
        stage.start()
        stage.gang.say("exit", "b", rank=2, attempt=attempt, code=None, signal=9, log_tail="")
        stage.turn()
        for node in BOTH:
            stage.gang.say("killed", node, attempt=attempt)
        stage.turn(2)
    stage.start()
    assert ("spawn", 3, {"a": [0, 1], "c": [2, 3]}) in stage.gang.calls
    assert list(stage.store.run().excluded) == ["b"]
    assert EventKind.NODE_EXCLUDED in stage.kinds()


def test_without_another_plan_it_is_taken_back(tmp_path: Path) -> None:
    stage = Stage(tmp_path, nodes=BOTH, backoff_s=0.0, exclude_after=1, shrink=False)
    stage.start()
    stage.gang.say("exit", "b", rank=2, attempt=1, code=None, signal=9, log_tail="")
    stage.turn()
    for node in BOTH:
        stage.gang.say("killed", node, attempt=1)
    stage.turn(2)
    stage.start()
    assert ("spawn", 2, {"a": [0, 1], "b": [2, 3]}) in stage.gang.calls
    (back,) = [event.data for event in stage.store.events() if event.kind is EventKind.NODE_READMITTED]
    assert back["nodes"] == ["b"]
    assert dict(stage.store.run().excluded) == {}


@pytest.mark.parametrize("told", [BOTH, ("a",), ("b",)])
def test_a_successor_knows_what_was_ordered(tmp_path: Path, told: tuple[str, ...]) -> None:
    """And says it again where it had not come to every node: all ranks leave after the same step, or none."""
    stage = Stage(tmp_path)
    stage.start()
    steps(stage, 1, 1, 3)
    stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)
    stage.turn()
    (order,) = orders(stage)
    stage.lock.release()
    stage.renew()
    connect = stage.gang.connect

    def meet(addresses: Any) -> None:
        connect(addresses)
        for seen in stage.gang.queue:
            if seen.node in BOTH:
                seen.data.update(attempt=1, leave_after=order[2] if seen.node in told else 0)
        stage.gang.say("notice", "b", reason="SIGTERM", within_s=25.0)

    stage.gang.connect = meet  # type: ignore[method-assign]
    adoption.begin(stage.controller)
    stage.turn()
    assert stage.controller.state is not None
    assert (stage.controller.state.leaving, stage.controller.state.leave_after) == ("move", order[2])
    assert orders(stage) == ([] if told == BOTH else [order])


def test_the_word_in_memory() -> None:
    book = OrderBook()
    orders = [Orders(book.share()), Orders(book.share()), Orders(-1)]
    assert not any(order.leaves_after(step) for order in orders for step in range(1, 5))
    book.leave(7, reached=4)
    book.leave(9, reached=7)  # some may be leaving: it stays at 7
    assert [order.leaves_after(7) for order in orders] == [True, True, False]
    book.leave(12, reached=8)  # all have passed it
    assert [step for step in range(1, 20) if orders[0].leaves_after(step)] == [12]
    book.close()
    assert orders[0].leaves_after(12)


def test_what_is_saved_then_is_said_with_it() -> None:
    """A copy in memory is enough until somebody asks for more, after the same step."""
    book = OrderBook()
    order = Orders(book.share())
    book.leave(7, reached=4, in_memory=True)
    assert (order.leaves_after(6), order.leaves_after(7), order.in_memory) == (False, True, True)
    book.leave(9, reached=5)
    assert (order.leaves_after(7), order.in_memory) == (True, True)
    book.leave(7, reached=5)
    assert (order.leaves_after(7), order.in_memory) == (True, False)
    book.leave(7, reached=6, in_memory=True)
    assert (order.leaves_after(7), order.in_memory) == (True, False)
    book.leave(12, reached=8, in_memory=True)
    assert (order.leaves_after(12), order.in_memory) == (True, True)
