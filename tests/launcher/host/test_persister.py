"""The persister as a process: what it keeps, what it writes, what it gives back, and when it does not."""

from __future__ import annotations

import array
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.checkpoint import fence, newest, verify
from jobs.checkpoint.errors import OutOfReach
from jobs.checkpoint.fence import Branch, Debt
from jobs.checkpoint.image import Image
from jobs.checkpoint.layout import Token, manifests, writers
from jobs.checkpoint.manifest import list_checkpoints
from jobs.checkpoint.memory import Address, Generation, StreamInfo
from jobs.checkpoint.memory_source import MemorySource
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.slices import whole
from jobs.frames import FrameError
from jobs.paths import RunPaths
from jobs.worker import damaged
from launcher.generations import choose
from launcher.host import wire
from launcher.host.persist import main, replica, service
from launcher.host.persist.main import Persister
from launcher.host.persist.peering import PeerLink, PeerServer, pull
from launcher.host.persist.service import no_room
from launcher.host.persist.shelf import Shelf
from tests.support.cgroups import limited
from tests.support.persisters import Node, eventually, gang, newest_in, values

MakeNode = Callable[[str], Node]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeNode]:
    nodes: list[Node] = []

    def node(name: str) -> Node:
        nodes.append(Node(tmp_path, name))
        return nodes[-1]

    yield node
    for one in nodes:
        one.close()


@pytest.fixture
def two(make: MakeNode) -> list[Node]:
    return [make("a"), make("b")]


def test_a_checkpoint_is_committed_when_every_part_is_durable(two: list[Node], tmp_path: Path) -> None:
    first, second = gang(two)
    first.put(3, flush=True)
    assert first.outcome(3, wait_s=0.0) is None
    assert newest(tmp_path / "checkpoints") is None
    second.put(3, flush=True)
    done = first.outcome(3)
    assert done["path"] == str(newest(tmp_path / "checkpoints"))
    assert verify(done["path"], deep=True) == []
    reader = Reader(done["path"])
    assert reader.read_flat("w", "exp_avg", 0, 1000).tolist() == [4.0] * 1000
    assert (reader.manifest.step, reader.manifest.extra, reader.rank_state(1)) == (3, {"step": 3}, {"rank": 1})
    assert done["bytes"] == reader.manifest.bytes


def test_what_was_copied_is_written_although_its_rank_is_dead(make: MakeNode, tmp_path: Path) -> None:
    (rank,) = gang([make("a")])
    rank.put(4, flush=True, hold=True)  # it would have had something to say before the commit
    rank.link.close()
    assert eventually(lambda: newest(tmp_path / "checkpoints") is not None)
    (found,) = list_checkpoints(tmp_path / "checkpoints")
    assert (found.step, found.token) == (4, rank.token)


def test_a_gang_that_was_replaced_commits_nothing_before_its_successor_has_written_anything(
    make: MakeNode, tmp_path: Path
) -> None:
    """It has all of step 100 on the disk, and no link or a slow disk; the next one begins with step 90, in memory."""
    node, root = make("a"), tmp_path / "checkpoints"
    (old,) = gang([node])
    old.put(90, flush=True)
    assert old.outcome(90)["step"] == 90
    old.put(100, flush=True, hold=True)
    old.ask("durable")
    fence.raise_fence(root, Token(2, 2), owner="its controller")
    fence.begin(root, Branch(epoch=2, attempt=2, history=((90, 1, 1),)))
    (new,) = gang([node], Token(2, 2))
    for step in range(91, 97):
        new.put(step)
    assert {place.token for place in writers(root)} == {Token(1, 1)}
    old.ask("release")
    assert old.outcome(100)["error"]["kind"] == "conflict"
    assert [place.step for place in manifests(root)] == [90]
    assert "step 100 of e0001-a0001 is not committed: The gang e0001-a0001 may not commit" in node.log.read_text()
    best = Generation(list_checkpoints(root)[0].step, Token(1, 1))
    point = choose([node.stock()], beyond=best, branch=fence.current(root), skips=(), rejected=())
    assert point is not None
    assert point.generation == Generation(96, Token(2, 2))


def test_a_gang_that_began_without_the_store_fences_before_it_commits(make: MakeNode, tmp_path: Path) -> None:
    """Its controller could not; the one before has everything on the disk meanwhile, and commits some of it."""
    node, root = make("a"), tmp_path / "checkpoints"
    (old,) = gang([node])
    for step in (88, 95):
        old.put(step, flush=True)
        assert old.outcome(step)["step"] == step
    old.put(100, flush=True, hold=True)
    old.ask("durable")
    owed = Debt(owner="its controller", branch=Branch(epoch=1, attempt=2, history=((90, 1, 1),)))
    (new,) = gang([node], Token(1, 2), debt=owed)
    new.put(91)
    assert fence.highest(root) is None
    new.put(92, flush=True)
    assert new.outcome(92)["step"] == 92
    assert fence.current(root) == owed.branch
    assert [one.step for one in list_checkpoints(root)] == [92, 88]
    new.put(93, flush=True)
    assert new.outcome(93)["step"] == 93
    old.ask("release")
    assert old.outcome(100)["error"]["kind"] == "conflict"


def test_a_gang_that_was_replaced_before_it_had_laid_its_fence_commits_nothing(make: MakeNode, tmp_path: Path) -> None:
    owed = Debt(owner="its controller", branch=Branch(epoch=1, attempt=2))
    (rank,) = gang([make("a")], Token(1, 2), debt=owed)
    fence.raise_fence(tmp_path / "checkpoints", Token(2, 3), owner="the next controller")
    rank.put(5, flush=True)
    assert rank.outcome(5)["error"]["kind"] == "conflict"
    assert manifests(tmp_path / "checkpoints") == []


def test_a_later_gang_that_no_controller_has_started_fences_by_what_it_writes(make: MakeNode, tmp_path: Path) -> None:
    node = make("a")
    (old,) = gang([node])
    old.put(4, flush=True, hold=True)
    old.ask("durable")
    (new,) = gang([node], Token(1, 2))
    new.put(2, flush=True)
    assert new.outcome(2)["step"] == 2
    old.ask("release")
    assert old.outcome(4)["error"]["kind"] == "conflict"
    assert [entry.step for entry in list_checkpoints(tmp_path / "checkpoints")] == [2]


def test_a_part_that_cannot_be_written_fails_the_checkpoint_and_leaves_nothing(two: list[Node], tmp_path: Path) -> None:
    first, second = gang(two)
    place = second.place(3, tmp_path)
    place.shard_dir.mkdir(parents=True)
    place.shard(1).write_bytes(b"somebody else's")
    first.put(3, flush=True)
    second.put(3, flush=True)
    error = first.outcome(3)["error"]
    assert "exists already" in error["what"]
    assert error["kind"] == "conflict"
    assert eventually(lambda: not place.shard(0).exists())
    assert place.shard(1).read_bytes() == b"somebody else's"
    assert newest(tmp_path / "checkpoints") is None


def test_what_could_not_be_written_is_tried_again(two: list[Node], tmp_path: Path) -> None:
    """Its failure is told only when nobody deletes or writes for it any more; then the same place may be used."""
    first, second = gang(two)
    place = second.place(3, tmp_path)
    place.step_dir.mkdir(parents=True)
    place.shard_dir.write_bytes(b"where a folder should be")
    first.put(3, flush=True)
    assert eventually(lambda: first.outcome(3, wait_s=0.0) is None)
    second.put(3, flush=True)
    assert first.outcome(3)["error"]["kind"] == "storage"
    place.shard_dir.unlink()
    for rank in (second, first):  # in any order
        rank.put(3, flush=True, again=True)
    done = first.outcome(3)
    assert done["path"] == str(newest(tmp_path / "checkpoints"))
    assert verify(done["path"], deep=True) == []


def test_a_part_that_seemed_not_to_arrive_is_written_over(two: list[Node], tmp_path: Path) -> None:
    """A store that does not answer may have taken it all the same; it is ours, of this very step."""
    first, second = gang(two)
    place = second.place(3, tmp_path)
    place.shard_dir.mkdir(parents=True)
    place.shard(1).write_bytes(b"half of it")
    for rank in (first, second):
        rank.put(3, flush=True, again=True)
    assert verify(first.outcome(3)["path"], deep=True) == []


def test_what_a_manifest_that_seemed_not_to_arrive_names_is_not_touched(make: MakeNode, tmp_path: Path) -> None:
    """The checkpoint exists: from then on it stays whole, whatever happens to the next try."""
    (rank,) = gang([make("a")])
    rank.put(3, flush=True)
    arrived = rank.outcome(3)
    shard = rank.place(3, tmp_path).shard(0)
    before = shard.stat()
    rank.put(3, flush=True, again=True)
    assert rank.outcome(3) == arrived
    assert (shard.stat().st_ino, shard.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert verify(arrived["path"], deep=True) == []


def test_where_a_manifest_cannot_be_looked_for_nothing_is_deleted(make: MakeNode, tmp_path: Path) -> None:
    (rank,) = gang([make("a")])
    place = rank.place(3, tmp_path)
    place.shard_dir.mkdir(parents=True)
    place.shard(0).write_bytes(b"perhaps the shard of a checkpoint")
    place.manifest.symlink_to(place.manifest.name)  # a loop: nobody can say what is there
    rank.put(3, flush=True, again=True)
    assert rank.outcome(3)["error"]["kind"] == "storage"
    assert place.shard(0).read_bytes() == b"perhaps the shard of a checkpoint"


def test_a_gang_that_was_replaced_does_not_try_again(make: MakeNode, tmp_path: Path) -> None:
    (rank,) = gang([make("a")])
    rank.put(3, flush=True)
    rank.outcome(3)
    root = tmp_path / "checkpoints"
    fence.raise_fence(root, Token(2, 2), owner="its controller")
    fence.begin(root, Branch(epoch=2, attempt=2, history=()))
    rank.put(3, flush=True, again=True)
    assert rank.outcome(3)["error"]["kind"] == "conflict"


def test_a_part_that_nobody_can_make_sense_of_is_not_waited_for(two: list[Node], tmp_path: Path) -> None:
    """Whatever goes wrong in the background, the rank that asks is told."""
    first, second = gang(two)
    first.put(3, flush=True)
    second.fill(3.0)
    record = {"rank_state": {}, "trainer": {}, "time": 0.0, "extra": {}}
    second.ask("seal", step=3, record=record, flush=True, hold=False)
    assert first.outcome(3)["error"] == {"kind": "other", "what": "KeyError: 'optimizer_steps'", "why": "", "hint": ""}
    assert eventually(lambda: not first.place(3, tmp_path).shard(0).exists())


def test_what_cannot_be_deleted_is_told_and_costs_no_checkpoint(make: MakeNode, tmp_path: Path) -> None:
    (rank,) = gang([make("a")])
    rank.place(1, tmp_path).manifest.mkdir(parents=True)
    for step in (2, 3):  # of which two are kept
        rank.put(step, flush=True)
        done = rank.outcome(step)
    assert done["path"] == str(newest(tmp_path / "checkpoints"))
    assert "old checkpoints stay" in done["warning"]
    assert "prune the checkpoints" in done["warning"]


def test_the_newest_two_are_held_and_the_one_being_copied_is_not(make: MakeNode) -> None:
    node = make("a")
    (rank,) = gang([node])
    for step in range(1, 6):
        rank.put(step)
    rank.fill(6.0)
    held = sorted(one.step for one in node.stock().held)
    assert held[-2:] == [4, 5]
    assert 6 not in held
    point = newest_in([node])
    assert point is not None
    assert values(point, node) == [5.0] * 1000
    rank.link.close()  # dies in the middle of its copy
    assert eventually(lambda: newest_in([node]) == point)
    assert values(point, node, "exp_avg_sq") == [7.0] * 1000


def test_a_lost_node_is_restored_from_its_replica(two: list[Node]) -> None:
    ranks = gang(two)
    for step in (1, 2, 3):
        for rank in ranks:
            rank.put(step)
    for rank in ranks:
        rank.fill(9.0)  # the copy of step 4 begins once the replicas of step 3 are confirmed
    two[1].close()
    point = newest_in(two[:1])
    assert point is not None
    assert point.step == 3
    assert {located.node for located in point.parts} == {"a"}
    assert values(point, two[0]) == [3.0] * 1000


def test_parts_of_other_nodes_come_over_the_network(two: list[Node], make: MakeNode) -> None:
    ranks = gang(two, elements=3_000_000)
    for rank in ranks:
        rank.put(1)
    point = newest_in(two)
    assert point is not None
    assert [located.node for located in point.parts] == ["a", "b"]
    spare = make("c")
    assert set(values(point, spare)) == {1.0}


def test_nothing_is_complete_without_one_of_the_parts(make: MakeNode) -> None:
    nodes = [make(name) for name in "abc"]
    for rank in gang(nodes):
        rank.put(1)
        rank.fill(0.0)
    assert newest_in(nodes) is not None
    assert newest_in(nodes[1:]) is not None  # the replica of a is with b
    assert newest_in(nodes[:1]) is None


def test_a_restored_generation_stays_until_the_next_gang_has_its_own(make: MakeNode) -> None:
    node = make("a")
    (old,) = gang([node])
    for step in (1, 2, 3):
        old.put(step)
    point = newest_in([node])
    assert point is not None
    old.link.close()
    (new,) = gang([node], Token(1, 2), restored=point.generation)
    assert [one.step for one in node.stock().held] == [3]
    new.put(4)
    new.put(5)
    assert point.generation in [one.generation for one in node.stock().held]
    new.put(6)
    assert {one.attempt for one in node.stock().held} == {2}


def test_what_the_next_gang_did_not_restore_is_forgotten(make: MakeNode) -> None:
    node = make("a")
    (old,) = gang([node])
    old.put(7)
    gang([node], Token(1, 2), restored=None)
    assert node.stock().held == ()


def test_without_a_memory_tier_only_what_is_on_its_way_is_held(two: list[Node]) -> None:
    first, second = gang(two, in_memory=False)
    for step in (2, 4):
        for rank in (first, second):
            rank.put(step, flush=True)
        assert first.outcome(step)["step"] == step
    assert all(one.own for node in two for one in node.stock().held)


def test_a_replica_that_cannot_be_placed_stops_nobody(two: list[Node]) -> None:
    first, second = gang(two)
    for rank in (first, second):
        rank.put(1)
    two[1].close()
    for step in (2, 3, 4):
        first.put(step)
    assert "no replica" in two[0].log.read_text()
    assert max(one.step for one in two[0].stock().held if one.own) == 4


def test_a_step_is_confirmed_once_its_replica_is_held_elsewhere(two: list[Node]) -> None:
    ranks = gang(two, elements=3_000_000)
    for rank in ranks:
        rank.put(1)
    for rank in ranks:
        assert rank.ask("settle")["broken"] == ""
    assert [[one.step for one in node.stock().held if not one.own] for node in two] == [[1], [1]]


def test_a_gang_is_told_what_replicas_have_cost_before_it(two: list[Node]) -> None:
    ranks = gang(two, elements=3_000_000)
    for rank in ranks:
        assert rank.opened["toil_s"] == 0.0
        rank.put(1)
    known = [rank.ask("settle")["toil_s"] for rank in ranks]
    assert min(known) > 0.0
    later = gang(two, Token(1, 2))
    assert all(rank.opened["toil_s"] >= toil_s for rank, toil_s in zip(later, known, strict=True))


def test_a_node_that_did_not_take_a_replica_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt may last for weeks: one stumble of the network must not leave it without replicas.

    Nobody waits for a node that may not answer: a step that comes meanwhile has no replica.
    """
    monkeypatch.setattr(replica, "_RETRY_S", 0.0)
    arrived: list[int] = []
    streams, answers = [], threading.Event()
    answers.set()

    def handle(message: dict[str, Any], sock: socket.socket) -> tuple[dict[str, Any], bytes]:
        if message["op"] == "stream":
            streams.append(message)
            assert answers.wait(2)
        if message["op"] == "replica":
            pull(sock, memoryview(bytearray(message["payload"])))
            arrived.append(message["step"])
            if len(arrived) == 2:
                raise FrameError("the connection breaks before it is confirmed")
        return {}, b""

    server = PeerServer("127.0.0.1", b"secret", handle)
    server.start()
    image = tuple(Image(slices=(whole("w", (100,)),)).rows())
    info = StreamInfo(epoch=1, attempt=1, rank=0, world=1, image=image, about={})
    shelf = Shelf()
    stream = shelf.open(info, own=True, in_memory=True, restored=None)
    sender = replica.Replicator(shelf, b"secret", server.address)
    broken = []
    for step in (1, 2, 3, 4, 5):
        held = shelf.begin(stream)
        shelf.seal(held, step, {})
        sender.submit(held)
        sender.settle()
        broken.append(bool(sender.broken))
        if step == 2:
            answers.clear()
        if step == 3:
            assert eventually(lambda: len(streams) == 2)
            assert not held.pins
            answers.set()
            assert eventually(lambda: not sender.broken)
    sender.end()
    assert (arrived, broken) == ([1, 2, 4, 5], [False, True, True, False, False])
    assert [held.pins for held in stream.parts] == [0] * len(stream.parts)


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Persister, PeerServer, list[int]]]:
    """A persister, a coordinator that answers at the ninth call only, and the steps that it is told of."""
    told: list[int] = []

    def handle(message: dict[str, Any], _: socket.socket) -> tuple[dict[str, Any], bytes]:
        told.append(message["step"])
        return {}, b""

    def call(secret: bytes, address: Address) -> PeerLink:
        calls.append(address)
        if len(calls) < 9:
            raise FrameError("no route to host")
        return PeerLink(secret, address)

    calls: list[Address] = []
    secret = wire.make_secret(RunPaths(tmp_path).secret)
    coordinator = PeerServer("127.0.0.1", secret, handle)
    coordinator.start()
    monkeypatch.setattr(service, "PeerLink", call)
    for name in ("_PAUSE_S", "_MAX_PAUSE_S"):
        monkeypatch.setattr(main, name, 0.001)
    persister = Persister(str(tmp_path), "127.0.0.1")
    yield persister, coordinator, told
    persister.server._listener.close()
    for link in persister.directory._links.values():
        link.close()


def test_a_coordinator_that_is_away_for_long_is_told_in_the_end(
    unreachable: tuple[Persister, PeerServer, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the gang would wait for a checkpoint, although all of it is on the disk."""
    persister, coordinator, told = unreachable
    token = Token(1, 3)
    persister.directory.learn(token, [coordinator.address, persister.server.address])
    persister._tell(token, {"op": "part", "step": 7})
    assert told == [7]
    assert capsys.readouterr().out.count("no route to host") == 1


def test_an_attempt_that_was_replaced_is_not_told_for_ever(
    unreachable: tuple[Persister, PeerServer, list[int]],
) -> None:
    persister, coordinator, told = unreachable
    for attempt in (3, 4):
        persister.directory.learn(Token(1, attempt), [coordinator.address, persister.server.address])
    persister._tell(Token(1, 3), {"op": "part", "step": 7})
    assert told == []


def test_replicas_of_many_ranks_may_begin_at_once(two: list[Node]) -> None:
    ranks = gang([two[0]] * 12 + [two[1]] * 12)
    threads = [threading.Thread(target=rank.put, args=(1,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in ranks:
        rank.fill(2.0)  # which waits for the replica
    assert all("no replica" not in node.log.read_text() for node in two)
    assert [sum(not one.own for one in node.stock().held) for node in two] == [12, 12]


def test_a_part_that_is_gone_is_out_of_reach_and_says_where(two: list[Node], make: MakeNode) -> None:
    """Whoever held it may have held it well: nothing is said against the generation."""
    for rank in gang(two, in_memory=False):
        rank.put(1, flush=True)
    point = newest_in(two)
    assert point is not None
    two[1].close()
    with pytest.raises(OutOfReach, match="rank 1 on b cannot be had") as raised:
        values(point, two[0])
    assert raised.value.path == str(Generation(1, Token(1, 1)))
    assert not damaged(raised.value)


def test_a_node_that_dies_in_the_middle_of_a_restore_is_not_needed(make: MakeNode) -> None:
    nodes = [make(name) for name in "abcd"]
    for rank in gang(nodes):
        rank.put(1)
        rank.fill(0.0)  # which waits for the replica
    point = newest_in(nodes)
    assert point is not None
    assert [located.node for located in point.parts] == list("abcd")
    source = MemorySource(point, nodes[0].connect())
    header = source.header(source.manifest.shards[1])
    nodes[1].close()  # after its header has been read; d has a replica of what it held
    stored = header.slices[0]
    block = source.block(header, stored, "master", 0)
    assert array.array("f", block).tolist() == [1.0] * stored.slice.elements
    nodes[3].close()
    with pytest.raises(OutOfReach, match=r"rank 1 on d cannot be had: .*rank 1 on b cannot be had: "):
        source.block(header, stored, "master", 0)


def test_a_host_without_room_keeps_nothing_and_says_why() -> None:
    assert no_room(10 * 10**9, 140 * 10**9) == ""
    assert "7 copies of 10.10 GB are more than 50% of the 140.0 GB that this host may use" in no_room(
        101 * 10**8, 140 * 10**9
    )


def test_what_a_host_has_is_what_its_cgroup_allows(make: MakeNode) -> None:
    with limited(256 << 20) as folder:
        node = make("a")
        asked = {"share": 30 << 20}
        assert node.connect().ask("hello", **asked)[0]["refused"] == ""
        (folder / "cgroup.procs").write_text(str(node.process.pid))
        refused = node.connect().ask("hello", **asked)[0]["refused"]
        assert "7 copies of 0.03 GB are more than 50% of the 0.3 GB that this host may use" in refused
        node.close()


def test_a_stranger_is_not_served(make: MakeNode, tmp_path: Path) -> None:
    node = make("a")
    (rank,) = gang([node])
    rank.put(1)
    address = node.stock().address
    question = {"op": "record", "step": 1, "token": [1, 1], "rank": 0}
    good = PeerLink(RunPaths(tmp_path).secret.read_bytes().strip(), address)
    assert good.ask(question)[0]["bytes"] == 12_000
    good.close()
    with pytest.raises(FrameError):
        PeerLink(b"another secret", address)


def test_goodbye_waits_for_what_is_being_written(make: MakeNode, tmp_path: Path) -> None:
    node = make("a")
    (rank,) = gang([node], elements=2_000_000)
    rank.put(1, flush=True)
    node.goodbye()
    assert newest(tmp_path / "checkpoints") is not None


def test_it_ends_with_its_agent(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    agent = os.fork()
    if agent == 0:
        node = Node(tmp_path)
        os.write(writer, str(node.process.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(agent, 0)
    pid = int(os.read(reader, 20))
    assert eventually(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())
