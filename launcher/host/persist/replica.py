"""Sends each sealed part of a stream to the node that keeps the replica."""

from __future__ import annotations

import threading
import time

from jobs.checkpoint.memory import Address, StreamInfo
from jobs.frames import FrameError
from launcher.host.persist.peering import PeerLink
from launcher.host.persist.shelf import Held, Shelf
from strategies.codec import to_json

_PATIENCE_S = 3.0  # of silence; the gang waits for a replica, and must not be taken for hanging
_RETRY_S = 30.0


class Replicator:
    """The sender of one stream; a thread of its own.

    A target that cannot be reached is left alone for a while: training goes on without replicas, and the reason is
    told. Then it is called again, for an attempt may last for weeks; nothing is sent, and so nobody waits, before it
    answers.

    Args:
        shelf: Where the parts are.
        secret: The run's secret.
        target: Persister of the other node.

    Attributes:
        broken: Why nothing is sent for now; empty as long as it is.
    """

    def __init__(self, shelf: Shelf, secret: bytes, target: Address) -> None:
        self._shelf = shelf
        self._secret = secret
        self._target = target
        self._next: Held | None = None
        self._info: StreamInfo | None = None
        self._calls = False  # a target that was left alone
        self._ended = False
        self._retry_at = 0.0
        self.broken = ""
        threading.Thread(target=self._run, daemon=True, name="replica").start()

    def submit(self, held: Held) -> None:
        """Send this one; the one before must have been confirmed."""
        with self._shelf.changed:
            self._info = held.stream.info
            if not self.broken:
                self._next = held
                self._shelf.pin(held)
            elif time.monotonic() >= self._retry_at:
                self._calls = True
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
                self._shelf.changed.wait_for(lambda: self._next is not None or self._calls or self._ended)
                held = self._next
            if held is None and self._ended:
                break
            broken = ""
            try:
                link = link or self._call()
                if held is not None:
                    with self._shelf.toiling():
                        self._send(link, held)
            except FrameError as error:
                broken = f"no replica at {self._target.host}:{self._target.port} for now: {error}"
                print(f"warning: {broken}", flush=True)
                if link is not None:
                    link.close()
                link = None
            with self._shelf.changed:
                self.broken, self._retry_at = broken, time.monotonic() + _RETRY_S
                self._next, self._calls = None, False
                if held is not None:
                    self._shelf.unpin(held)
        if link is not None:
            link.close()

    def _call(self) -> PeerLink:
        """A connection on which our stream has begun."""
        link = PeerLink(self._secret, self._target, _PATIENCE_S)
        try:
            link.ask({"op": "stream", "info": to_json(self._info)})
        except BaseException:
            link.close()
            raise
        return link

    def _send(self, link: PeerLink, held: Held) -> None:
        data = held.buffer.view
        info = held.stream.info
        message = {"op": "replica", "token": info.token, "rank": info.rank, "step": held.step, "record": held.record}
        link.push(message, data)
