"""What a rank and its persister agree on before the first step. No engine: its state is a few numbers here."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest

from jobs.checkpoint import saver
from jobs.checkpoint.image import Image
from jobs.checkpoint.persister import PersisterLink
from jobs.checkpoint.saver import BehindSaver
from jobs.checkpoint.slices import whole
from jobs.hooks import NoHooks
from jobs.report import Reporter
from jobs.spec import CheckpointSpec, RankEnv
from tests.support.jobspecs import make_job

HERE, THERE = ({"host": "127.0.0.1", "port": port, "incarnation": "i"} for port in (1, 2))


class Link:
    """A persister that remembers what it was asked."""

    def __init__(self, refused: str) -> None:
        self.refused = refused
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def ask(self, op: str, **fields: Any) -> tuple[dict[str, Any], bytes, list[int]]:
        self.asked.append((op, fields))
        return {"address": HERE, "refused": self.refused}, b"", []

    def fields(self, op: str) -> dict[str, Any]:
        return next(fields for asked, fields in self.asked if asked == op)


def opened(
    monkeypatch: pytest.MonkeyPatch, rank: int, refused: dict[int, str], *, share: float = 0.0
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
    env = RankEnv(
        rank=rank,
        local_rank=0,
        world_size=2,
        local_world_size=1,
        node_rank=rank,
        master_addr="127.0.0.1",
        master_port=1,
        run_id="r",
        run_dir="/nowhere",
        epoch=1,
        attempt=1,
        resume_from="",
    )
    job = dataclasses.replace(make_job(), checkpoint=CheckpointSpec(every=8, memory_every=1, memory_share=share))
    engine = SimpleNamespace(ds=None, own_time=SimpleNamespace(stalled_s=0.0), before_update=lambda act: None)
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
