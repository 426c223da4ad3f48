"""Logs pulled from the agent on the rank's node."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from launcher import rank_logs
from launcher.backend import AgentAddress
from launcher.host import announce, wire
from launcher.store import RunStore
from strategies.errors import NotFound
from tests.support.runs import failed_run

LOG = "".join(f"line {number}\n" for number in range(20_000))


class FakeAgent(threading.Thread):
    """Speaks the agent's side of the handshake and serves one log."""

    def __init__(self, store: RunStore) -> None:
        super().__init__(daemon=True)
        self.secret = wire.read_secret(store.paths.secret)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.roles: list[str] = []
        port = self.listener.getsockname()[1]
        address = AgentAddress(node="b", host="127.0.0.1", port=port, pid=1, slots=2, incarnation="word")
        announce.write(store.paths, address)

    def run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock, sock.makefile("rwb") as file:
                self.serve(cast(BinaryIO, file))

    def serve(self, file: BinaryIO) -> None:
        file.write(wire.encode({"op": "challenge", "nonce": "n"}))
        file.flush()
        hello = json.loads(file.readline())
        self.roles.append(hello["role"])
        proof = wire.client_proof(self.secret, "reader", "word", "n", hello["nonce"], hello["epoch"])
        if hello["proof"] != proof:
            return
        answer = wire.agent_proof(self.secret, "word", "n", hello["nonce"])
        file.write(wire.encode({"op": "welcome", "proof": answer}))
        file.flush()
        ask = json.loads(file.readline())
        data = LOG.encode()[ask["offset"] : ask["offset"] + ask["limit"]]
        body = {"data": data.decode(), "offset": ask["offset"], "next": ask["offset"] + len(data), "size": len(LOG)}
        file.write(wire.encode({"op": "tail", "id": ask["id"]} | body))
        file.flush()


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return failed_run(tmp_path)


@pytest.fixture
def agent(store: RunStore) -> Iterator[FakeAgent]:
    agent = FakeAgent(store)
    agent.start()
    yield agent
    agent.listener.shutdown(socket.SHUT_RDWR)
    agent.listener.close()
    agent.join(5)


def test_whole_log_comes_from_the_node_in_pieces(store: RunStore, agent: FakeAgent) -> None:
    piece = rank_logs.read_all(store.paths, 1, 3)  # ranks 2 and 3 are on node b
    assert piece is not None
    assert piece.text == LOG
    assert piece.source == "node b"
    assert set(agent.roles) == {"reader"}  # never as a controller: that would take the run over


def test_wrong_secret_gets_nothing(store: RunStore, agent: FakeAgent) -> None:
    agent.secret = b"other"
    assert rank_logs.read_all(store.paths, 1, 3) is None


def test_dead_agent_falls_back_to_the_copy(store: RunStore) -> None:
    address = AgentAddress(node="b", host="127.0.0.1", port=1, pid=1, slots=2, incarnation="word")
    announce.write(store.paths, address)
    assert rank_logs.read_all(store.paths, 1, 3) is None
    store.paths.rank_log(1, 3).write_text("copy")
    piece = rank_logs.read_all(store.paths, 1, 3)
    assert piece is not None
    assert piece.text == "copy"


def test_what_there_is_instead(store: RunStore) -> None:
    store.paths.rank_log(1, 3).write_text("copy")
    error = rank_logs.missing(store.paths, "demo", 1, 7)
    assert isinstance(error, NotFound)
    assert "attempt 1 rank 3" in str(error)
