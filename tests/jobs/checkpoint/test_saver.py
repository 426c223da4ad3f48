"""What a rank and its persister agree on before the first step. No engine: its state is a few numbers here."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import numpy as np
import pytest

from jobs.checkpoint import saver
from jobs.checkpoint.errors import CheckpointConflict
from jobs.checkpoint.fence import Branch, Debt
from jobs.checkpoint.image import Image
from jobs.checkpoint.outage import LATE_S, SIGN_OF_LIFE_S, waits
from jobs.checkpoint.persister import PersisterLink
from jobs.checkpoint.saver import BehindSaver
from jobs.checkpoint.slices import whole
from jobs.hooks import NoHooks
from jobs.paths import RunPaths
from jobs.report import Reporter
from jobs.spec import CheckpointSpec, RankEnv
from strategies.codec import to_json
from strategies.errors import StorageError
from tests.support.jobspecs import make_job

HERE, THERE = ({"host": "127.0.0.1", "port": port, "incarnation": "i"} for port in (1, 2))


class Link:
    """A persister that remembers what it was asked."""

    def __init__(self, refused: str) -> None:
        self.refused = refused
        self.outcomes: list[Any] = []  # of checkpoints, one by one
        self.toil_s = 0.0  # for replicas of all gangs so far
        self.on_ask: Callable[[str], None] = lambda op: None
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def ask(self, op: str, **fields: Any) -> tuple[dict[str, Any], bytes, list[int]]:
        self.asked.append((op, fields))
        self.on_ask(op)
        if op in ("open", "settle"):
            return {"broken": "", "toil_s": self.toil_s}, b"", []
        if op == "outcome":
            return {"done": self.outcomes.pop(0)}, b"", []
        if op == "begin":
            return {"buffer": 0, "bytes": 0}, b"", []
        return {"address": HERE, "refused": self.refused, "replica": False}, b"", []

    def fields(self, op: str) -> dict[str, Any]:
        return next(fields for asked, fields in self.asked if asked == op)


def opened(
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    refused: dict[int, str],
    *,
    share: float = 0.0,
    run_dir: str = "/nowhere",
    toil_s: float = 0.0,
) -> tuple[BehindSaver, Link]:
    """The saver of one of two ranks, each on a node of its own."""
    hooked = SimpleNamespace(register_step_pre_hook=lambda hook: None)
    optimizer = SimpleNamespace(inner=hooked, on_disks=False)
    monkeypatch.setattr(saver, "access", lambda ds: optimizer)
    monkeypatch.setattr(saver, "image_of_state", lambda found: Image(slices=(whole("w", (100,)),)))
    monkeypatch.setattr(saver, "runs_of", lambda found, image: [])
    other = [THERE, {}, refused.get(1 - rank, "")]
    monkeypatch.setattr(saver, "gather", lambda mine: [mine, other] if rank == 0 else [other, mine])
    link = Link(refused.get(rank, ""))
    link.toil_s = toil_s
    env = RankEnv(
        rank=rank,
        local_rank=0,
        world_size=2,
        local_world_size=1,
        node_rank=rank,
        master_addr="127.0.0.1",
        master_port=1,
        run_id="r",
        run_dir=run_dir,
        epoch=1,
        attempt=1,
        resume_from="",
    )
    job = dataclasses.replace(make_job(), checkpoint=CheckpointSpec(every=8, memory_every=1, memory_share=share))
    own_time = SimpleNamespace(stalled_s=0.0, wait=lambda call: call())
    engine = SimpleNamespace(ds=None, own_time=own_time, before_update=lambda act: None)
    made = BehindSaver(engine, job, env, NoHooks(), Reporter(-1), cast(PersisterLink, link))
    made.open()
    return made, link


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("full", [0, 1])
def test_where_one_node_has_no_room_nobody_copies(
    rank: int, full: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No generation would ever be complete; the replicas of the others would even go to the node without room."""
    made, link = opened(monkeypatch, rank, {full: "7 copies are more than half"})
    assert link.fields("open")["in_memory"] is False
    made.keep(1, {})
    assert [op for op, _ in link.asked] == ["hello", "open"]
    told = capsys.readouterr().out
    assert (f"from memory, on no node: that of rank {full} has no room (7 copies" in told) is (rank == 0)


def test_where_all_have_room_the_persister_is_told_what_is_coming(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, link = opened(monkeypatch, 0, {})
    assert link.fields("hello")["share"] == 100 * 4 * 3
    assert link.fields("open")["in_memory"] is True
    assert capsys.readouterr().out == ""


def test_a_copy_that_is_dear_is_made_seldom_on_all_ranks_alike(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = opened(monkeypatch, 0, {}, share=0.01)
    copied: list[int] = []
    monkeypatch.setattr(made, "_copy", lambda: None)
    monkeypatch.setattr(made, "_record", lambda extra: {})
    monkeypatch.setattr(made, "_seal", lambda step, record, *, flush: copied.append(step))
    monkeypatch.setattr(saver, "most", lambda price: [max(price[0], 0.05), 1.0])  # the other rank says 0.05 s
    for step in range(1, 33):
        made.keep(step, {})
        assert made.stalled_s() < 0.05
    assert copied == [1, 2, 4, 8, 16, 24, 32]
    assert made.copies_every == 8
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" steps")[0].split()[-1] for line in told] == ["2", "4", "8"]


class Clock:
    """Time of the saver, which passes only as told and while it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.passes)

    def passes(self, seconds: float) -> None:
        self.now += seconds


def copying(monkeypatch: pytest.MonkeyPatch, made: BehindSaver, link: Link) -> None:
    """Copies cost nothing, and each has a replica."""
    monkeypatch.setattr(made, "_copy", lambda: None)
    monkeypatch.setattr(made, "_record", lambda extra: {})
    monkeypatch.setattr(made, "_seal", lambda step, record, *, flush: setattr(made, "_unconfirmed", True))


@pytest.mark.parametrize(("toil_s", "every"), [(0.0, 1), (4.0, 4)])
def test_what_replicas_of_earlier_gangs_have_cost_makes_no_copy_rarer(
    toil_s: float, every: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A persister outlives ranks and has toiled for weeks; what it does for these ranks counts, of all cores."""
    clock = Clock(monkeypatch)
    made, link = opened(monkeypatch, 0, {}, share=0.5, toil_s=1e6)
    made._cores = 2
    copying(monkeypatch, made, link)
    monkeypatch.setattr(saver, "most", list)
    for step in range(1, 33):
        clock.passes(1.0)
        link.toil_s += toil_s if made._unconfirmed else 0.0
        made.keep(step, {})
        made.stalled_s()
    assert made.copies_every == every
    assert ("the state is copied into memory every 4 steps" in capsys.readouterr().out) is (every == 4)


def test_who_waits_for_a_slower_rank_does_not_wait_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage of a pipeline comes first to where the ranks agree on how often to copy."""
    clock = Clock(monkeypatch)
    made, link = opened(monkeypatch, 0, {}, share=0.01)
    copying(monkeypatch, made, link)
    monkeypatch.setattr(made, "_copy", lambda: clock.passes(0.0078125))
    prices: list[list[float]] = []

    def most(price: Sequence[float]) -> list[float]:
        clock.passes(0.5)
        prices.append(list(price))
        return prices[-1]

    monkeypatch.setattr(saver, "most", most)
    stalls = []
    for step in range(1, 17):
        clock.passes(1.0)
        made.keep(step, {})
        stalls.append(made.stalled_s())
    assert stalls == [0.0078125] * 16
    assert len(prices) == 3, "after copies 2, 7 and 12"
    assert {copy_s for copy_s, _ in prices} == {0.0078125}
    assert {step_s for _, step_s in prices} == {1.0}, "nor is a step taken for longer"
    assert made.copies_every == 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_persister_learns_what_this_gang_owes_and_no_other(
    epoch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = RunPaths(str(tmp_path)).debt(1)
    path.parent.mkdir(parents=True)
    debt = to_json(Debt(owner="a controller", branch=Branch(epoch=epoch, attempt=1)))
    path.write_text(json.dumps(debt))
    _, link = opened(monkeypatch, 0, {}, run_dir=str(tmp_path))
    assert link.fields("open")["info"]["about"]["debt"] == (debt if epoch == 1 else None)


def saving(monkeypatch: pytest.MonkeyPatch, *outcomes: Any) -> tuple[BehindSaver, Link, list[dict[str, Any]]]:
    """Rank 0 of a gang that has nobody to agree with, whose checkpoints end like this; and what it reports."""
    made, link = opened(monkeypatch, 0, {})
    link.outcomes = list(outcomes)
    made._buffers[0] = np.zeros(0, np.float32)
    monkeypatch.setattr(saver, "agree", lambda error, value=None: [value] if error is None else _raise(error))
    monkeypatch.setattr(made, "_copy", lambda: link.ask("begin"))
    monkeypatch.setattr(made, "_record", lambda extra: {})
    monkeypatch.setattr(made, "_copier", SimpleNamespace(wait=lambda: None, then=lambda act: act()))
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(made._reporter, "send", lambda kind, **fields: told.append({"kind": kind, **fields}))
    return made, link, told


def _raise(error: Exception) -> NoReturn:
    raise error


FULL = {"error": {"kind": "storage", "what": "Cannot write.", "why": "No space left on device", "hint": ""}}
FENCED = {"error": {"kind": "conflict", "what": "Fenced.", "why": "", "hint": ""}}


def written(step: int) -> dict[str, Any]:
    return {"step": step, "path": f"/c/{step}", "committed": 0.0, "bytes": 1, "written_bytes": 1, "warning": ""}


def test_training_goes_on_beside_a_checkpoint_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made, link, told = saving(monkeypatch, FULL, written(10))
    made.save(5, {})
    assert told == [], "nobody knows yet"
    made.save(10, {})
    (unsaved,) = told
    assert (unsaved["kind"], unsaved["step"], unsaved["reason"]) == (
        "unsaved",
        5,
        "Cannot write. (No space left on device)",
    )
    assert unsaved["stall_s"] >= 0
    made.save(15, {})
    assert [one["kind"] for one in told] == ["unsaved", "checkpoint"]
    bases = [fields["base"] for op, fields in link.asked if op == "seal"]
    steps = [base.rpartition("step-")[2][:8] for base in bases]
    assert steps == ["", "", "00000010"], "only what exists is gone on from"


def test_one_that_is_due_while_the_one_before_is_being_written_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made, link, told = saving(monkeypatch, None, None, written(5), written(20))
    for step in (5, 10, 15, 20, 25):
        made.save(step, {})
    waited = [fields["wait_s"] for op, fields in link.asked if op == "outcome"]
    assert waited == [LATE_S, 0.0, 0.0, LATE_S], "patience is had once"
    assert [fields["flush"] for op, fields in link.asked if op == "seal"] == [True, False, False, True, True]
    assert [(one["kind"], one["step"]) for one in told] == [("unsaved", 5), ("checkpoint", 5), ("checkpoint", 20)]


@pytest.mark.parametrize("earlier", [written(5), FULL, None])
def test_the_last_one_is_not_left_out(earlier: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has become of the one before, which was late, is told all the same."""
    made, link, told = saving(monkeypatch, None, earlier, written(10))
    made.save(5, {})
    made.save(10, {}, must=True)
    assert made.finish() is None
    assert [fields["flush"] for op, fields in link.asked if op == "seal"] == [True, True]
    assert [(fields["step"], fields["wait_s"]) for op, fields in link.asked if op == "outcome"] == [
        (5, LATE_S),
        (5, LATE_S),
        (10, None),
    ]
    late = [] if earlier is None else [("unsaved" if earlier is FULL else "checkpoint", 5)]
    assert [(one["kind"], one["step"]) for one in told] == [("unsaved", 5), *late, ("checkpoint", 10)]


def test_who_was_fenced_off_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, told = saving(monkeypatch, FENCED)
    made.save(5, {})
    with pytest.raises(CheckpointConflict):
        made.save(10, {})
    assert told == []


def test_the_last_checkpoint_is_tried_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    made, link, told = saving(monkeypatch, FULL, FULL, written(5))
    made.save(5, {}, must=True)
    assert made.finish(patience_s=100.0) is None
    assert sum(slept) == pytest.approx(2 + 4)
    assert max(slept) <= SIGN_OF_LIFE_S
    kinds = [one["kind"] for one in told]
    assert kinds == ["unsaved", "step", "unsaved", "step", "step", "checkpoint"], "every wait is told to be alive"
    assert [fields.get("again") for op, fields in link.asked if op == "seal"] == [False, True, True]


def test_what_a_checkpoint_has_cost_is_told_although_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that says nothing is waited for where the next checkpoint is due: that one has cost the time."""
    clock = Clock(monkeypatch)
    made, link, told = saving(monkeypatch, FULL, FULL, written(15))
    link.on_ask = lambda op: clock.passes({"outcome": 8.0, "begin": 0.25}.get(op, 0.0))
    for step in (5, 10, 15):
        made.save(step, {})
        made.stalled_s()
        clock.passes(100.0)
    made._settle(None)
    assert [(one["kind"], one["step"], one["stall_s"]) for one in told] == [
        ("unsaved", 5, 0.25),
        ("unsaved", 10, 8.25),
        ("checkpoint", 15, 8.25),
    ]


@pytest.mark.parametrize("must", [False, True])
def test_what_a_late_checkpoint_has_cost_is_told_once(must: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The patience with it; the copy of the step that was left out is one in memory."""
    clock = Clock(monkeypatch)
    made, link, told = saving(monkeypatch, None, written(10 if must else 5))
    link.on_ask = lambda op: clock.passes({"outcome": LATE_S, "begin": 0.25}.get(op, 0.0))
    made.save(5, {})
    kept_s = [made.stalled_s()]
    made.save(10, {}, must=must)
    kept_s.append(made.stalled_s())
    assert kept_s == [0.0, 0.0 if must else 0.25]
    made._settle(None)
    assert [(one["kind"], one["step"], one["stall_s"]) for one in told] == [
        ("unsaved", 5, LATE_S),
        ("checkpoint", 10 if must else 5, 0.25),
    ]


def test_each_second_of_a_checkpoint_that_is_tried_again_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    made, link, told = saving(monkeypatch, FULL, FULL, written(5))
    link.on_ask = lambda op: clock.passes({"outcome": 60.0, "begin": 0.25}.get(op, 0.0))
    made.save(5, {}, must=True)
    assert made.finish(patience_s=1000.0) is None
    stalls = [one["stall_s"] for one in told if one["kind"] in ("unsaved", "checkpoint")]
    assert stalls == [60.25, 62.25, 64.25]
    assert sum(stalls) == clock.now - 1000.0


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, _ = saving(monkeypatch, FULL)
    made.save(5, {}, must=True)
    failure = made.finish()
    assert isinstance(failure, StorageError)
    assert failure.what == "Cannot write."


def test_waits_grow_and_end_with_patience() -> None:
    clock = [0.0]
    found = []
    for wait_s in waits(300.0, lambda: clock[0]):
        found.append(wait_s)
        clock[0] += wait_s
    assert found == [2, 4, 8, 16, 32, 60, 60, 60, 58]
    assert list(waits(0.0, lambda: 0.0)) == []


def test_a_copy_to_leave_at_is_whole_and_waits_for_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    made, link = opened(monkeypatch, 0, {})
    acts: list[str] = []
    then: list[Callable[[], None]] = []

    def wait() -> None:
        acts.append("whole")
        while then:
            then.pop()()

    copier = SimpleNamespace(then=then.append, wait=wait)
    monkeypatch.setattr(made, "_copier", copier)
    monkeypatch.setattr(made, "_copy", lambda: acts.append("copy"))
    monkeypatch.setattr(made, "_record", lambda extra: {})
    monkeypatch.setattr(made, "_confirm", lambda: acts.append("confirmed"))
    answer = link.ask

    def ask(op: str, **fields: Any) -> Any:
        found, data, fds = answer(op, **fields)
        return found | {"replica": True}, data, fds

    monkeypatch.setattr(link, "ask", ask)
    made.copy(7, {})
    assert acts == ["whole", "copy", "whole", "confirmed"]
    sealed = link.fields("seal")
    assert (sealed["step"], sealed["flush"]) == (7, False)
    assert "outcome" not in [op for op, _ in link.asked]
