"""The persister's process, started by the agent as ``python -P -m launcher.host.persist.main``.

It ends with its agent: at once when that dies (the node counts as lost then), after what it is writing when the agent
says goodbye.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import threading
import time
from typing import Any

from jobs.checkpoint.layout import Token
from jobs.frames import FrameError
from jobs.paths import RunPaths
from launcher.host import child, wire
from launcher.host.persist.flush import Flusher
from launcher.host.persist.peering import PeerServer
from launcher.host.persist.service import Desk, Directory, Guests
from launcher.host.persist.shelf import Shelf
from strategies.codec import to_json

MAX_MESSAGE_BYTES = 1 << 20
DRAIN_S = 5.0
_TRIES = 5  # of telling what an attempt has written that was replaced
_PAUSE_S = 0.2  # after the first try, twice as long after each one more ...
_MAX_PAUSE_S = 5.0  # ... but no longer


class Persister:
    """All of it, wired together.

    Args:
        run_dir: The run directory.
        host: Address to listen on for other persisters.
    """

    def __init__(self, run_dir: str, host: str) -> None:
        paths = RunPaths(run_dir)
        secret = wire.read_secret(paths.secret)
        self.shelf = Shelf()
        self.directory = Directory(secret)
        self.flusher = Flusher(self.shelf, paths.checkpoints, self._tell)
        self._guests = Guests(self.shelf, self.flusher)
        self.server = PeerServer(host, secret, self._guests.handle)

    def start(self, listener: socket.socket) -> None:
        """Serve ranks and other persisters in the background."""
        self.server.start()
        threading.Thread(target=self._accept, args=(listener,), daemon=True, name="ranks").start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            desk = Desk(self.shelf, self.flusher, self.directory, self.server.address)
            threading.Thread(target=desk.serve, args=(sock,), daemon=True).start()

    def _tell(self, token: Token, message: dict[str, Any]) -> None:
        """Bring news of a part to the coordinator; without it no checkpoint is committed, and its ranks wait.

        So an attempt that may be running is told however long the coordinator cannot be reached.
        """
        tries, pause_s, warned = 0, _PAUSE_S, ""
        while tries < _TRIES or self.directory.is_newest(token):
            where = self.directory.coordinator(token)
            if where is None:
                return
            if where == self.server.address:
                self.flusher.take(message)
                return
            try:
                self.directory.ask(where, message)
                return
            except FrameError as error:
                if str(error) != warned:  # once, not every few seconds for as long as it is away
                    warned = str(error)
                    print(f"warning: the coordinator of {token} cannot be told: {warned}", flush=True)
                time.sleep(pause_s)
                tries, pause_s = tries + 1, min(2 * pause_s, _MAX_PAUSE_S)

    def holdings(self) -> dict[str, Any]:
        """What is here, and where: for the controller."""
        held = [one.told() for one in self.shelf.holdings()]
        return {"address": to_json(self.server.address), "held": held}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    for name in ("fd", "listener", "parent"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("run-dir", "host"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    child.die_with_parent(signal.SIGKILL, args.parent)
    child.set_name("phalanx:persister")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the agent ends it, after what it is writing
    agent, listener = (socket.socket(fileno=fd) for fd in (args.fd, args.listener))
    persister = Persister(args.run_dir, args.host)
    persister.start(listener)
    agent.send(json.dumps({"op": "ready"}).encode())
    while data := agent.recv(MAX_MESSAGE_BYTES):
        message = json.loads(data)
        if message["op"] == "bye":
            persister.flusher.drain(DRAIN_S)
            break
        answer = {"op": "holdings", "id": message["id"]} | persister.holdings()
        agent.send(json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
