"""Sends each sealed part of a stream to the node that keeps the replica."""

from __future__ import annotations

import threading

from jobs.checkpoint.memory import Address
from jobs.frames import FrameError
from launcher.host.persist.peering import PeerLink, checksum
from launcher.host.persist.shelf import Held, Shelf
from strategies.codec import to_json


class Replicator:
    """The sender of one stream; a thread of its own.

    A target that cannot be reached any more is given up for this attempt: training goes on without replicas, and the
    reason is told.

    Args:
        shelf: Where the parts are.
        secret: The run's secret.
        target: Persister of the other node.

    Attributes:
        broken: Why nothing is sent any more; empty as long as it is.
    """

    def __init__(self, shelf: Shelf, secret: bytes, target: Address) -> None:
        self._shelf = shelf
        self._secret = secret
        self._target = target
        self._next: Held | None = None
        self._ended = False
        self.broken = ""
        threading.Thread(target=self._run, daemon=True, name="replica").start()

    def submit(self, held: Held) -> None:
        """Send this one; the one before must have been confirmed."""
        with self._shelf.changed:
            if not self.broken:
                self._next = held
                self._shelf.pin(held)
                self._shelf.changed.notify_all()

    def settle(self) -> None:
        """Wait until what was submitted is confirmed, or never will be."""
        with self._shelf.changed:
            self._shelf.changed.wait_for(lambda: self._next is None)

    def end(self) -> None:
        """Nothing more will be submitted."""
        with self._shelf.changed:
            self._ended = True
            self._shelf.changed.notify_all()

    def _run(self) -> None:
        link: PeerLink | None = None
        while True:
            with self._shelf.changed:
                self._shelf.changed.wait_for(lambda: self._next is not None or self._ended)
                held = self._next
            if held is None:
                break
            try:
                if link is None:
                    link = PeerLink(self._secret, self._target)
                    link.ask({"op": "stream", "info": to_json(held.stream.info)})
                self._send(link, held)
            except FrameError as error:
                self.broken = f"no replica at {self._target.host}:{self._target.port} any more: {error}"
                print(f"warning: {self.broken}", flush=True)
            with self._shelf.changed:
                self._next = None
                self._shelf.unpin(held)
        if link is not None:
            link.close()

    def _send(self, link: PeerLink, held: Held) -> None:
        data = held.buffer.view
        info = held.stream.info
        message = {"op": "replica", "token": info.token, "rank": info.rank, "step": held.step, "record": held.record}
        link.ask(message | {"checksum": checksum(data)}, data)
