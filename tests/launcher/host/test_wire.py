"""Framing, limits and the handshake, and what attackers get out of them: nothing."""

from __future__ import annotations

import itertools
import json
import os
import resource
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.host import announce, process, wire
from launcher.host.events import EventLog
from launcher.host.reader import LogReader
from launcher.host.wire import LineReader, Stream, WireError
from strategies.errors import ClusterError, StorageError
from tests.support.agents import Agents, Watcher

pytestmark = pytest.mark.timeout(60)


class Stranger:
    """Somebody who can connect to the agent."""

    def __init__(self, agents: Agents) -> None:
        address = agents.address()
        self.sock = socket.create_connection((address.host, address.port), timeout=10.0)
        self.incarnation = address.incarnation
        self.lines = LineReader()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def read(self) -> dict[str, Any]:
        """One message; fails at the end of the connection."""
        while True:
            data = self.sock.recv(65536)
            assert data, "closed"
            for line in self.lines.feed(data):
                return wire.decode(line)

    def rest(self) -> bytes:
        """Everything that still comes until the agent hangs up."""
        data = b""
        deadline = time.monotonic() + 10.0
        try:
            while time.monotonic() < deadline and (piece := self.sock.recv(65536)):
                data += piece
        except ConnectionResetError:
            pass
        return data

    def hello(
        self, secret: bytes, changes: dict[str, Any] | None = None, *, role: str = "controller", epoch: int = 1
    ) -> None:
        """Answer the challenge; ``changes`` replace parts of the answer, the proof stays that of the original."""
        nonce = self.read()["nonce"]
        mine = wire.new_nonce()
        proof = wire.client_proof(secret, role, self.incarnation, nonce, mine, epoch)
        message = {"op": "hello", "role": role, "epoch": epoch, "nonce": mine, "proof": proof} | (changes or {})
        self.sock.sendall(json.dumps(message).encode() + b"\n")


def test_lines_are_cut_and_limited() -> None:
    reader = LineReader(10)
    assert reader.feed(b"ab") == []
    assert reader.feed(b"c\nde\nf") == [b"abc", b"de"]
    assert reader.feed(b"\n") == [b"f"]
    with pytest.raises(WireError):
        reader.feed(b"x" * 11)
    with pytest.raises(WireError):
        LineReader(10).feed(b"x" * 11 + b"\n")


@pytest.mark.parametrize("line", [b"", b"[1]", b"7", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_not_an_object_is_refused(line: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(line)


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(WireError):
        wire.encode({"text": "x" * wire.MAX_LINE_BYTES})


def test_a_stream_gives_up_on_a_peer_that_does_not_read() -> None:
    left, right = socket.socketpair()
    stream = Stream(left, max_pending=1 << 20)
    for _ in range(100):
        stream.send({"text": "x" * 100_000})
    assert stream.closed == "the other side does not read"
    right.close()


def test_a_stream_hands_out_what_came_before_the_end() -> None:
    left, right = socket.socketpair()
    stream = Stream(left)
    right.sendall(b'{"a": 1}\n{"b": 2}\nrest')
    right.close()
    assert stream.receive() == [{"a": 1}, {"b": 2}]
    assert stream.receive() == []
    assert stream.closed


def test_the_secret_is_private_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    secret = wire.make_secret(path)
    assert len(secret) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert wire.make_secret(path) == secret
    path.write_text("")
    with pytest.raises(StorageError):
        wire.read_secret(path)
    with pytest.raises(StorageError):
        wire.read_secret(tmp_path / "no such file")


def test_a_proof_is_good_for_one_role_agent_epoch_and_challenge() -> None:
    proofs = {
        wire.client_proof(*arguments)
        for arguments in [
            (b"s", "controller", "agent", "n", "m", 1),
            (b"t", "controller", "agent", "n", "m", 1),
            (b"s", "reader", "agent", "n", "m", 1),
            (b"s", "controller", "other", "n", "m", 1),
            (b"s", "controller", "agent", "o", "m", 1),
            (b"s", "controller", "agent", "n", "o", 1),
            (b"s", "controller", "agent", "n", "m", 2),
        ]
    }
    assert len(proofs | {wire.agent_proof(b"s", "agent", "n", "m")}) == 8


def test_events_are_bounded_and_keep_what_matters() -> None:
    log = EventLog()
    log.append({"kind": "spawned"})
    for step in range(1, 10_001):
        for rank in range(2):
            log.append({"kind": "step", "rank": rank, "step": step})
    kept = []
    cursor = 0
    while (following := log.after(cursor)) is not None:
        cursor, line = following
        kept.append(wire.decode(line)["event"])
    assert [(event["kind"], event.get("step")) for event in kept] == [
        ("spawned", None),
        ("step", 10_000),
        ("step", 10_000),
    ]
    assert cursor == log.last == 20_001
    for number in range(10_000):
        log.append({"kind": "odd", "number": number})
    assert log.after(0) is not None
    assert len(log._numbers) == len(log._lines) == 4096


@pytest.mark.parametrize(
    "changes",
    [
        {"proof": "0" * 64},
        {"proof": None},
        {"proof": "\u00e9"},
        {"epoch": 2},
        {"epoch": True},
        {"epoch": "1"},
        {"epoch": 1e400},
        {"role": "reader"},
        {"role": "root"},
        {"nonce": 7},
        {"op": "spawn"},
    ],
)
def test_a_wrong_hello_is_dropped_without_a_word(agents: Agents, changes: dict[str, Any]) -> None:
    agents.start()
    with Stranger(agents) as stranger:
        stranger.hello(wire.read_secret(agents.paths.secret), changes)
        assert stranger.rest() == b""
    agents.watch("n0")


def test_a_proof_for_another_agent_opens_nothing(agents: Agents) -> None:
    """Somebody sits on the port of a dead agent and passes the controller's answer on to a living one."""
    agents.start()
    with Stranger(agents) as relay:
        relay.incarnation = "the dead agent"
        relay.hello(wire.read_secret(agents.paths.secret))
        assert relay.rest() == b""


def test_a_false_agent_is_recognised(agents: Agents) -> None:
    """Somebody sits on the port of a dead agent and welcomes everybody."""
    agents.start()
    real = agents.address()
    with socket.create_server(("127.0.0.1", 0)) as server:
        import dataclasses

        false = dataclasses.replace(real, port=server.getsockname()[1], node="false", incarnation="word")
        watcher = Watcher(agents.paths)
        agents.watchers.append(watcher)
        watcher.gang.connect([false])
        watcher.gang.poll(0.0)
        victim, _ = server.accept()
        with victim:
            victim.sendall(b'{"op": "challenge", "nonce": "abc"}\n')
            watcher.gang.poll(1.0)
            hello = wire.decode(victim.recv(65536).rstrip())
            # the best it can do: send the client's own proof back
            victim.sendall(wire.encode({"op": "welcome", "proof": hello["proof"], "attempt": 1, "ranks": []}))
            assert "not the agent" in watcher.until_kind("agent_lost").data["why"]


def test_a_reader_can_read_and_nothing_else(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="step=1,wait")
    with Stranger(agents) as reader:
        reader.hello(wire.read_secret(agents.paths.secret), role="reader", epoch=99)
        assert reader.read()["op"] == "welcome"
        for order in ({"op": "kill", "attempt": 1}, {"op": "shutdown"}, {"op": "reserve", "attempt": 5}):
            reader.sock.sendall(wire.encode(order))
        reader.sock.sendall(wire.encode({"op": "tail", "id": 3, "attempt": 1, "rank": 0, "offset": 0, "limit": 4}))
        assert reader.read() == {"op": "tail", "id": 3, "data": "rank", "offset": 0, "next": 4, "size": 12}
    assert not [o for o in watcher.listen(0.5) if o.kind in ("exit", "killed", "leaving", "fenced", "agent_lost")]


@pytest.mark.parametrize(
    "order",
    [
        b"junk\n",
        b'{"op": "no such"}\n',
        b"{}\n",
        b'{"op": []}\n',
        b'{"op": "kill"}\n',
        b'{"op": "kill", "attempt": "x"}\n',
        b'{"op": "tail", "rank": 1}\n',
        b'{"op": "spawn", "attempt": 1, "epoch": 1, "kind": "root", "ranks": []}\n',
        b'{"op": "spawn", "attempt": 1, "epoch": 1, "kind": "script", "argv": [], "ranks": []}\n',
        b'{"op": "spawn", "attempt": 1, "epoch": 1, "kind": "pretrain", "ranks": [7]}\n',
        b'{"op": "spawn", "attempt": 1, "epoch": 1, "kind": "pretrain", "ranks": [{"rank": 0, "env": {"A": 1}}]}\n',
        b"x" * (wire.MAX_LINE_BYTES + 2),
    ],
)
def test_a_malformed_order_ends_the_connection_and_not_the_agent(agents: Agents, order: bytes) -> None:
    agent = agents.start()
    with Stranger(agents) as controller:
        controller.hello(wire.read_secret(agents.paths.secret))
        assert controller.read()["op"] == "welcome"
        controller.sock.sendall(order)
        controller.rest()
    watcher = agents.watch("n0")
    watcher.spawn(5, {"n0": [0]}, FAKE="done")
    assert watcher.until_kind("exit", attempt=5).data["code"] == 0
    assert agent.poll() is None


def test_who_says_nothing_is_dropped(agents: Agents) -> None:
    agents.start()
    with Stranger(agents) as stranger:
        assert stranger.read()["op"] == "challenge"
        assert stranger.rest() == b""


def test_an_agent_beats_three_times_in_the_bound_or_more_often(agents: Agents) -> None:
    bound_s, came = 2.4, list[float]()
    agents.start(detect_s=bound_s)
    with Stranger(agents) as controller:
        controller.hello(wire.read_secret(agents.paths.secret))
        while len(came) < 6:
            if controller.read()["op"] == "beat":
                came.append(time.monotonic())
    # The shortest: a busy machine makes a gap longer, and hardly all of them shorter.
    assert min(after - before for before, after in itertools.pairwise(came)) <= bound_s / 3


def memory_of(pid: int) -> int:
    """Resident bytes."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_a_flood_of_junk_grows_nothing_and_stops_nobody(agents: Agents) -> None:
    agent = agents.start()
    watcher = agents.watch("n0")
    before = memory_of(agent.pid)
    strangers = [Stranger(agents) for _ in range(150)]
    for stranger in strangers:
        stranger.sock.setblocking(False)
        for _ in range(20):
            try:
                stranger.sock.send(b"x" * 65536)
            except OSError:
                break
    watcher.spawn(1, {"n0": [0]}, FAKE="done")
    assert watcher.until_kind("exit").data["code"] == 0
    assert memory_of(agent.pid) - before < 16 << 20
    assert len(os.listdir(f"/proc/{agent.pid}/fd")) < 100
    for stranger in strangers:
        stranger.sock.close()


def test_more_readers_than_allowed_push_out_the_oldest(agents: Agents) -> None:
    agents.start()
    watcher = agents.watch("n0")
    secret = wire.read_secret(agents.paths.secret)
    readers = [LogReader(agents.address(), secret) for _ in range(20)]
    with pytest.raises(ClusterError):
        readers[0].read(1, 0, 0, 10)
    for reader in readers:
        reader.close()
    assert not [o for o in watcher.listen(0.3) if o.kind == "agent_lost"]


def test_a_slow_owner_is_fed_from_the_log_and_not_from_a_buffer(agents: Agents) -> None:
    agent = agents.start()
    watcher = agents.watch("n0")
    watcher.spawn(1, {"n0": [0]}, FAKE="steps=0.0002")
    watcher.report("step")
    before = memory_of(agent.pid)
    time.sleep(2.0)
    assert memory_of(agent.pid) - before < 8 << 20
    first = watcher.report("step").data["step"]
    watcher.listen(0.5)
    assert max(o.data["step"] for o in watcher.seen if o.data.get("kind") == "step") > first + 100


def test_announcements_are_whole_and_only_taken_back_by_their_agent(agents: Agents) -> None:
    import dataclasses

    agents.start()
    address = agents.address()
    assert announce.read_all(agents.paths) == [address]
    later = dataclasses.replace(address, incarnation="later")
    announce.write(agents.paths, later)
    announce.remove(agents.paths, address)
    assert announce.read_all(agents.paths) == [later]
    announce.path_of(agents.paths, "torn").write_text('{"node": "to')
    assert announce.read_all(agents.paths) == [later]
    assert process.is_running(address.pid)
