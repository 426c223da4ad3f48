"""A fault that was noticed somehow, some time, is not proven: it must be this one, in its moment, and end well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.manifest import commit
from jobs.checkpoint.slices import whole
from launcher.drill.bounds import most_lost
from launcher.drill.case import Aim
from launcher.drill.catalogue import CATALOGUE
from launcher.run import EventKind
from launcher.store import RunStore
from tests.support.checkpoints import manifest_of, write_shards
from tests.support.drills import attempt, begun, case, ended, fall, gathered, metrics, proof
from tests.support.runs import T0, put

SLOW = Aim(rank=3, node=1, other=0, step=40)
CUT = "link of b (10.0.0.2) down"


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    """The first attempt trains, at ten steps a second from 11.0 on."""
    store = begun(tmp_path)
    attempt(store, 1, 2.0, why="start")
    return store


# ---- a rank that is slow ---------------------------------------------------------------------------------------------


def name_slow(run: RunStore, rank: int, step: int) -> None:
    detail = f"rank {rank} on b takes 1.31x as long as it should"
    failure = {"kind": "straggler", "time": T0 + 11 + step / 10, "rank": rank, "node": "b", "step": step}
    put(run, 11 + step / 10, EventKind.STRAGGLER_FOUND, attempt=1, failure=failure | {"detail": detail}, ratio=1.31)


@pytest.fixture
def slow(run: RunStore) -> RunStore:
    """Rank 3 is slow from step 40 of 80 on."""
    proof(run, "rank_slow.rank-3.step-40", 15.0)
    metrics(run, 1, range(1, 81), 11.0)
    return run


def test_the_rank_that_is_slow_must_be_named_soon_after_it_became_so(slow: RunStore) -> None:
    name_slow(slow, 1, 50)  # another, by mistake: that is no failure
    name_slow(slow, 3, 60)
    ended(slow, 20, number=1, step=80)
    found = gathered("straggler", slow, SLOW)
    assert (found.fired, found.broken) == (True, ())
    assert "rank 3 on b takes 1.31x" in found.proof
    assert found.detected_s == pytest.approx(17.0 - 15.0)


@pytest.mark.parametrize(("rank", "step"), [(1, 45), (3, 39)], ids=["another rank", "before it was slow"])
def test_a_false_alarm_proves_no_slow_rank(slow: RunStore, rank: int, step: int) -> None:
    name_slow(slow, rank, step)
    ended(slow, 20, number=1, step=80)
    found = gathered("straggler", slow, SLOW)
    assert not found.fired
    assert f"it shows straggler_found (rank {rank} on b takes 1.31x" in found.proof


def test_a_slow_rank_that_is_named_late_is_a_failure(slow: RunStore) -> None:
    name_slow(slow, 3, 61)
    ended(slow, 20, number=1, step=80)
    found = gathered("straggler", slow, SLOW)
    assert (found.fired, found.broken) == (True, ("named after 21 steps, and must be within 20",))


# ---- a node that is told to leave ------------------------------------------------------------------------------------


@pytest.fixture
def told(run: RunStore) -> RunStore:
    """Node b will be taken away: its ranks are to leave after step 12."""
    proof(run, "drill.1", 12.0, did="SIGTERM at the agent of b (process 7)")
    reason = "node b will be taken away in 25 s (SIGTERM): all ranks save and leave after step 12"
    put(run, 12.1, EventKind.DECISION, attempt=1, action="leave", reason=reason, delay_s=0.0)
    metrics(run, 1, range(1, 13), 11.0)
    return run


def leave(run: RunStore, at: float, nodes: list[str]) -> None:
    put(run, at, EventKind.GANG_STOPPED, attempt=1, cause="it left in good order", failure="", last_step=12)
    attempt(run, 2, at + 0.1, first=13, nodes=nodes, why="move")
    metrics(run, 2, range(13, 81), at)
    ended(run, at + 10, step=80)


def test_ranks_that_leave_in_time(told: RunStore) -> None:
    leave(told, 36.9, ["a", "c"])
    found = gathered("preemption", told)
    assert (found.fired, found.broken, found.costly, found.most_lost) == (True, (), False, 0)
    assert "node b will be taken away" in found.proof


@pytest.mark.parametrize(
    ("at", "nodes", "wrong"),
    [
        (37.1, ["a", "c"], "the ranks were gone after 25.1 s, and must be within 25.0 s"),
        (20.0, ["a", "b"], "b carries ranks again"),
    ],
)
def test_ranks_that_leave_too_late_or_nowhere(told: RunStore, at: float, nodes: list[str], wrong: str) -> None:
    leave(told, at, nodes)
    assert gathered("preemption", told).broken == (wrong,)


def test_ranks_that_were_to_leave_and_were_killed_at_the_deadline(told: RunStore) -> None:
    """The decision alone is no proof: steps were lost, and the agent has ended its ranks."""
    fall(told, 37.2, "preempted", last=12)
    attempt(told, 2, 38, first=4, nodes=["a", "c"], why="move")
    ended(told, 50, step=80)
    found = gathered("preemption", told)
    assert not found.fired
    assert "the log should show leave and no failure; it shows leave: " in found.proof
    assert (found.steps_lost, found.costly) == (9, True)


def test_a_node_that_is_given_up_at_once_has_not_left(run: RunStore) -> None:
    proof(run, "drill.1", 12.0, did="SIGTERM at the agent of b (process 7)")
    fall(run, 12.5, "preempted")
    ended(run, 50, step=80)
    assert not gathered("preemption", run).fired


def test_the_word_must_be_of_the_node_that_was_told(told: RunStore) -> None:
    leave(told, 20.0, ["c", "b"])
    found = gathered("preemption", told, Aim(rank=3, node=0, other=1, step=8))
    assert not found.fired
    assert "does not name the place of SIGTERM at the agent of b" in found.proof


# ---- the moment of an act --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("done", "fired"), [(13.05, True), (13.2, False)])
def test_what_dies_in_a_recovery_dies_before_the_ranks_train_again(run: RunStore, done: float, fired: bool) -> None:
    """Node a dies as attempt 2 begins: before its first step that is a recovery, after it an ordinary failure."""
    proof(run, "rank_kill.rank-3.step-8", 12.0)
    fall(run, 12.5, "rank_killed", rank=3)
    proof(run, "drill.1", 12.7, done=T0 + done, did="SIGKILL of all 4 processes of a")
    attempt(run, 2, 13.0, first=8, why="restart")
    reason = "c takes the place of a: it stands by"
    put(run, 14, EventKind.DECISION, attempt=2, action="swap", reason=reason, delay_s=0.0)
    ended(run, 20, step=20)
    found = gathered("node_kill_in_recovery", run)
    assert found.fired is fired
    assert fired or "0.10 s after the log had training_started, and must be before it" in found.proof


def cut_and_mended(run: RunStore, mended: float) -> None:
    proof(run, "drill.1", 12.0, did=CUT)
    proof(run, "drill.2.relief", 12.1, did="SIGCONT of rank process 7")
    fall(run, 17.0, "partitioned")
    attempt(run, 2, 18.0, first=8, nodes=["a", "c"], why="restart")
    metrics(run, 2, range(8, 21), 18.0)  # the last at 20.0
    proof(run, "drill.3.relief", mended, attempt=2, did="link of b (10.0.0.2) up again")
    ended(run, 20.5)


def save(run: RunStore, step: int, number: int, at: float) -> None:
    """A committed checkpoint of an attempt."""
    place = Place(run.paths.checkpoint_dir, step, Token(1, number))
    pieces = [[whole("w", (30, 10), 0, 300)]]
    document = manifest_of(place, write_shards(place, pieces), {"w": (30, 10)})
    commit(run.paths.checkpoint_dir, replace(document, time=T0 + at))


def test_a_link_that_heals_while_the_others_train(run: RunStore) -> None:
    cut_and_mended(run, 19.0)
    save(run, 6, 1, 11.7)
    save(run, 9, 2, 19.1)
    found = gathered("partition_heals", run)
    assert (found.fired, found.broken) == (True, ())
    assert "up again" in found.proof


def test_a_link_that_heals_when_all_is_over_has_not_healed(run: RunStore) -> None:
    cut_and_mended(run, 20.6)
    found = gathered("partition_heals", run)
    assert not found.fired
    assert "0.10 s after the log had run_succeeded" in found.proof


def test_a_link_that_heals_after_the_last_step_shows_nothing(run: RunStore) -> None:
    cut_and_mended(run, 20.2)
    assert gathered("partition_heals", run).broken == ("no step was made after the link had come up",)


def test_what_is_committed_by_who_was_cut_off_is_a_failure(run: RunStore) -> None:
    cut_and_mended(run, 19.0)
    save(run, 9, 1, 19.1)
    assert gathered("partition_heals", run).broken == ("committed by who was cut off: step 9",)


# ---- the place of an act ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["partition", "spare_dies_first"])
def test_a_node_that_the_drill_struck_must_be_the_one_that_is_blamed(run: RunStore, name: str) -> None:
    kind, target = ("partitioned", "drill.1") if name == "partition" else ("node_lost", "drill.2")
    proof(run, "drill.1", 11.9, did="SIGKILL of all 3 processes of c")
    proof(run, target, 12.0, did=CUT)
    fall(run, 17.0, kind, node="b")
    attempt(run, 2, 18.0, first=8, why="restart")
    ended(run, 20.5)
    assert gathered(name, run).fired
    other = gathered(name, run, Aim(rank=3, node=0, other=1, step=8))
    assert not other.fired
    assert f"does not name the place of {CUT}" in other.proof


def test_a_word_of_before_the_strike_is_none_of_it(run: RunStore) -> None:
    fall(run, 11.0, "partitioned")
    proof(run, "drill.1", 12.0, did=CUT)
    attempt(run, 2, 18.0, first=8, why="restart")
    ended(run, 20.5)
    found = gathered("partition", run)
    assert not found.fired
    assert "the log should show partitioned" in found.proof


@pytest.mark.parametrize(("rank", "fired"), [(3, True), (2, False)])
def test_a_rank_that_the_drill_killed_must_be_the_one_that_is_blamed(run: RunStore, rank: int, fired: bool) -> None:
    shard = "step-00000006/e0001-a0001/shard-00000.safetensors"
    for number, did in ((1, f"{shard} deleted"), (2, "SIGKILL of rank process 7")):
        proof(run, f"drill.{number}", 12.0, did=did)
    fall(run, 12.5, "rank_killed", rank=rank)
    path = "/runs/run/checkpoints/step-00000006/e0001-a0001.manifest.json"
    put(run, 13, EventKind.CHECKPOINT_REJECTED, attempt=2, path=path, reason="it is not there")
    attempt(run, 2, 18.0, first=4, why="restart")
    ended(run, 20.5)
    found = gathered("missing_shard", run)
    assert found.fired is fired
    assert fired or "does not name the place of SIGKILL of rank process 7" in found.proof


def test_whatever_the_drill_does_to_a_gang_has_a_place() -> None:
    """But for the spare, of which no log speaks, and the Ray head, which is no node of the gang."""
    placeless = {
        one.name for one in CATALOGUE if one.failures and one.acts and not any(act.strikes for act in one.acts)
    }
    assert placeless == {"ray_head_kill"}


def test_who_is_told_to_leave_loses_nothing(run: RunStore) -> None:
    assert most_lost(case("preemption"), run.request()) == 0
