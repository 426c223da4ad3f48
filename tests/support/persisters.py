"""Real persister processes without agents, and ranks that are nothing but a connection and an image."""

from __future__ import annotations

import array
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.checkpoint.fence import Debt
from jobs.checkpoint.image import Image
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.memory import Address, Generation, Holding, MemoryPoint, StreamInfo
from jobs.checkpoint.memory_source import MemorySource
from jobs.checkpoint.persister import PersisterLink
from jobs.checkpoint.reader import Reader
from jobs.checkpoint.shardfile import KINDS
from jobs.checkpoint.slices import whole
from jobs.frames import listen_unix
from jobs.paths import RunPaths
from launcher.generations import Stock, choose
from launcher.host import wire
from launcher.host.persist.main import MAX_MESSAGE_BYTES
from strategies.codec import from_json, to_json
from tests.support.jobspecs import make_job

FIRST = Token(1, 1)
TRAINER = {"optimizer_steps": 0, "learning_rates": [0.1], "counters": {}, "loss_scaler": {}}


class Node:
    """One persister, as an agent would start it.

    Args:
        run_dir: The run directory.
        name: Name of the node.
    """

    def __init__(self, run_dir: Path, name: str = "node0") -> None:
        self.run_dir = run_dir
        self.name = name
        wire.make_secret(RunPaths(run_dir).secret)
        self.folder = Path(tempfile.mkdtemp(prefix="phalanx-test-persister-"))
        self.path = str(self.folder / "persister")
        self.log = self.folder / "log"
        self._sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other, listen_unix(self.path) as listener, self.log.open("wb") as log:
            fds = [other.fileno(), listener.fileno()]
            command = [sys.executable, "-P", "-m", "launcher.host.persist.main", "--fd", str(fds[0])]
            command += ["--listener", str(fds[1]), "--run-dir", str(run_dir), "--host", "127.0.0.1"]
            command += ["--parent", str(os.getpid())]
            root = Path(__file__).resolve().parents[2]
            environment = {**os.environ, "PYTHONPATH": str(root)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=fds, env=environment)
        self._links: list[PersisterLink] = []
        assert json.loads(self._sock.recv(MAX_MESSAGE_BYTES))["op"] == "ready"

    def connect(self) -> PersisterLink:
        """A rank's connection."""
        self._links.append(PersisterLink(self.path))
        return self._links[-1]

    def stock(self) -> Stock:
        """What it holds, as the controller is told."""
        self._sock.send(json.dumps({"op": "holdings", "id": 1}).encode())
        answer = json.loads(self._sock.recv(MAX_MESSAGE_BYTES))
        held = tuple(Holding.read(one) for one in answer["held"])
        return Stock(node=self.name, address=from_json(Address, answer["address"]), held=held)

    def goodbye(self) -> None:
        """End it as an agent does that leaves."""
        self._sock.send(b'{"op": "bye"}')
        assert self.process.wait(20) == 0

    def close(self) -> None:
        """End it, if it lives."""
        self.process.kill()
        self.process.wait()
        self._sock.close()
        for link in self._links:
            link.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Writer:
    """A rank that holds an equal share of one vector.

    Args:
        node: Its node.
        rank: Its rank.
        world: Ranks of the gang.
        token: Who writes.
        elements: Length of the vector.
    """

    def __init__(self, node: Node, rank: int, world: int, token: Token = FIRST, elements: int = 1000) -> None:
        self.link = node.connect()
        self.rank, self.world, self.token = rank, world, token
        self.low, self.high = elements * rank // world, elements * (rank + 1) // world
        self.image = Image(slices=(whole("w", (elements,), self.low, self.high),))
        self._elements = elements
        self._maps: dict[int, mmap.mmap] = {}
        self.address = self.ask("hello")["address"]
        self.opened: dict[str, Any] = {}

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Ask the persister."""
        return self.link.ask(op, **fields)[0]

    def open(
        self,
        peers: Sequence[Any],
        *,
        in_memory: bool = True,
        restored: Generation | None = None,
        debt: Debt | None = None,
    ) -> None:
        """Begin, when every rank has told its address."""
        job = make_job()
        about = {"run_id": "test", "plan": to_json(job.plan), "model": to_json(job.model)}
        info = StreamInfo(
            epoch=self.token.epoch,
            attempt=self.token.attempt,
            rank=self.rank,
            world=self.world,
            image=tuple(self.image.rows()),
            about=about | {"tensors": {"w": [self._elements]}, "debt": to_json(debt) if debt else None},
        )
        fields = {"in_memory": in_memory, "keep": 2, "restored": restored, "peers": list(peers)}
        self.opened = self.ask("open", info=to_json(info), **fields)

    def fill(self, value: float) -> None:
        """Copy: every element of every kind is ``value`` and the number of its kind."""
        answer, _, fds = self.link.ask("begin")
        for fd in fds:
            self._maps[answer["buffer"]] = mmap.mmap(fd, answer["bytes"])
            os.close(fd)
        kinds = (array.array("f", [value + kind]) * self.image.elements for kind in range(len(KINDS)))
        self._maps[answer["buffer"]][:] = b"".join(data.tobytes() for data in kinds)

    def seal(
        self, step: int, *, flush: bool = False, hold: bool = False, again: bool = False, base: str | Path = ""
    ) -> None:
        """Say that it is whole; ``base`` is the manifest of the last checkpoint on the disk."""
        trainer = TRAINER | {"optimizer_steps": step}
        record = {"rank_state": {"rank": self.rank}, "trainer": trainer, "time": time.time(), "extra": {"step": step}}
        self.ask("seal", step=step, record=record, flush=flush, hold=hold, again=again, base=str(base))

    def put(self, step: int, *, flush: bool = False, hold: bool = False, again: bool = False) -> None:
        """Copy and seal a state whose values are its step."""
        self.fill(float(step))
        self.seal(step, flush=flush, hold=hold, again=again)

    def keep(self, step: int, value: float, base: str | Path = "") -> None:
        """Copy a state whose values are ``value`` at whatever step, and send it to the disk."""
        self.fill(value)
        self.seal(step, flush=True, base=base)

    def outcome(self, step: int, *, wait_s: float | None = None) -> Any:
        """What became of a checkpoint."""
        return self.ask("outcome", token=self.token, step=step, wait_s=wait_s)["done"]

    def place(self, step: int, root: Path) -> Place[Path]:
        """Where a checkpoint of ours is."""
        return Place(RunPaths(root).checkpoint_dir, step, self.token)


def gang(nodes: Sequence[Node], token: Token = FIRST, **options: Any) -> list[Writer]:
    """One rank on each node, all of them open."""
    restored, in_memory = options.pop("restored", None), options.pop("in_memory", True)
    debt = options.pop("debt", None)
    ranks = [Writer(node, rank, len(nodes), token, **options) for rank, node in enumerate(nodes)]
    for rank in ranks:
        rank.open([one.address for one in ranks], restored=restored, in_memory=in_memory, debt=debt)
    return ranks


def newest_in(nodes: Sequence[Node]) -> MemoryPoint | None:
    """What the controller would restore from these nodes."""
    stocks = [node.stock() for node in nodes]
    return choose(stocks, beyond=None, branch=None, skips=(), rejected=())


def values(point: MemoryPoint, node: Node, kind: str = "master") -> list[float]:
    """The vector, as a rank on ``node`` reads it."""
    reader = Reader(MemorySource(point, node.connect()))
    return [float(value) for value in reader.read_flat("w", kind, 0, reader.shape("w")[0])]


def eventually(condition: Any, timeout_s: float = 10.0) -> bool:
    """Poll until it holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
