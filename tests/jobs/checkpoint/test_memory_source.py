"""Parts of a generation in memory: who is asked for them, and what it means when nobody answers or answers wrongly."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from jobs import frames, worker
from jobs.checkpoint.errors import AbsentFile, CorruptCheckpoint, OutOfReach
from jobs.checkpoint.gang import _describe, revive
from jobs.checkpoint.image import Image
from jobs.checkpoint.memory import Address, Located, MemoryPoint, StreamInfo
from jobs.checkpoint.memory_source import MemorySource
from jobs.checkpoint.persister import PersisterLink, Refused
from jobs.checkpoint.shardfile import ELEMENT_BYTES
from jobs.checkpoint.slices import whole
from jobs.frames import FrameError, Garbled
from strategies.codec import to_json
from tests.support.jobspecs import make_job

ELEMENTS = 10
IMAGE = Image(slices=(whole("w", (ELEMENTS,), 0, ELEMENTS),))
PART_BYTES = IMAGE.bytes


def at(node: str) -> Address:
    return Address(host=node, port=1, incarnation=node)


def point(*holders: str) -> MemoryPoint:
    """A generation of one rank, whose part these nodes hold."""
    first, *others = holders
    there = tuple((node, at(node)) for node in others)
    part = Located(rank=0, bytes=PART_BYTES, node=first, address=at(first), others=there)
    return MemoryPoint(step=5, epoch=1, attempt=1, parts=(part,))


class Link:
    """A persister that reaches some nodes.

    Args:
        wrong: Node to what goes wrong when it is asked.
        size: What the others say that their part has.
    """

    def __init__(self, wrong: dict[str, FrameError], size: int = PART_BYTES) -> None:
        self.wrong, self.size = wrong, size
        self.asked: list[str] = []

    def ask(self, op: str, *, where: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], bytes, list[int]]:
        node = where["host"]
        self.asked.append(node)
        if node in self.wrong:
            raise self.wrong[node]
        if op == "read":
            return {}, node.encode() * ELEMENT_BYTES * ELEMENTS, []
        job = make_job()
        about = {"run_id": "r", "plan": to_json(job.plan), "model": to_json(job.model), "tensors": {"w": [ELEMENTS]}}
        info = StreamInfo(epoch=1, attempt=1, rank=0, world=1, image=tuple(IMAGE.rows()), about=about)
        trainer = {"optimizer_steps": 5, "learning_rates": [0.1], "counters": {}, "loss_scaler": {}}
        record = {"rank_state": {}, "trainer": trainer, "time": 1.0, "extra": {}}
        return {"record": record, "info": to_json(info), "bytes": self.size}, b"", []


def source(where: MemoryPoint, link: Link) -> MemorySource:
    return MemorySource(where, cast(PersisterLink, link))


def test_the_other_holder_is_asked_and_from_then_on_first() -> None:
    link = Link({"a": FrameError("timed out")})
    found = source(point("a", "b"), link)
    header = found.header(found.manifest.shards[0])
    assert found.block(header, header.slices[0], "master", 0)[:1] == b"b"
    assert link.asked == ["a", "b", "b"]  # the silence of a is waited for once
    link.wrong = {"b": Refused("gone")}
    assert found.block(header, header.slices[0], "master", 0)[:1] == b"a"


@pytest.mark.parametrize("why", [FrameError("timed out"), Refused("LookupError: it is not here")])
def test_who_cannot_be_reached_proves_nothing(why: FrameError) -> None:
    with pytest.raises(OutOfReach, match=r"rank 0 on a cannot be had: .*; the part of rank 0 on b") as raised:
        source(point("a", "b"), Link({"a": why, "b": why}))
    told = revive(_describe(raised.value) or {}, "rank 1: ")
    for error in (raised.value, told):  # as the rank raises it, and as the others do
        assert isinstance(error, OutOfReach)
        assert not worker.damaged(error)
        assert worker.exit_code(error) == 7


def test_what_arrives_otherwise_than_it_was_sent_is_damage_unless_another_has_it() -> None:
    assert source(point("a", "b"), Link({"a": Garbled("no")})).manifest.step == 5
    with pytest.raises(CorruptCheckpoint) as raised:
        source(point("a", "b"), Link({"a": Garbled("not what was sent"), "b": FrameError("timed out")}))
    assert worker.damaged(raised.value)
    with pytest.raises(CorruptCheckpoint, match="another size than was told") as raised:
        source(point("a"), Link({}, size=PART_BYTES + 4))
    assert worker.damaged(raised.value)


def test_what_the_ranks_tell_each_other_keeps_its_kind() -> None:
    for kind in (OutOfReach, AbsentFile, CorruptCheckpoint):
        assert type(revive(_describe(kind("memory:5:e0001-a0001", "why")) or {})) is kind


@pytest.mark.parametrize(("garbled", "kind"), [(True, Garbled), (False, Refused)])
def test_a_rank_is_told_which_it_is(garbled: bool, kind: type[FrameError], tmp_path: Path) -> None:
    listener = frames.listen_unix(str(tmp_path / "persister"))

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            frames.receive(sock)
            frames.send(sock, {"error": "no", "garbled": garbled})

    thread = threading.Thread(target=serve)
    thread.start()
    link = PersisterLink(str(tmp_path / "persister"))
    with pytest.raises(FrameError) as raised:
        link.ask("read")
    assert type(raised.value) is kind
    link.close()
    thread.join()


def test_all_holders_are_in_the_table_the_best_first() -> None:
    parts = (
        Located(rank=0, bytes=4, node="a", address=at("a"), others=(("b", at("b")),)),
        Located(rank=1, bytes=8, node="b", address=at("b"), others=(("a", at("a")), ("c", at("c")))),
        Located(rank=2, bytes=8, node="c", address=at("c")),
    )
    table = MemoryPoint(step=5, epoch=1, attempt=1, parts=parts)
    assert MemoryPoint.read(json.loads(json.dumps(table.table()))) == table
