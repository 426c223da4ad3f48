"""The agent's side of the persister: starts it, asks what it holds, replaces it when it dies. Never blocks."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.frames import listen_unix
from launcher.host import process
from launcher.host.environment import Environments
from launcher.host.persist.main import DRAIN_S, MAX_MESSAGE_BYTES

_LOOK_S = 0.05  # at one that is dying

NOTHING: dict[str, Any] = {"address": None, "held": []}
"""What a persister holds that is not there."""


class PersisterLink:
    """A persister and the connection to it.

    Args:
        selector: The agent's loop; callbacks take no argument.
        environments: Makes the persister's environment.
        run_dir: The run directory.
        host: The agent's address; other persisters reach ours by it.
        folder: Where it works and logs, and where ranks find its socket.
        incarnation: The agent's; part of the mark.
        died: Called with the reason when it has died; another one is being started then.
    """

    def __init__(
        self,
        *,
        selector: selectors.BaseSelector,
        environments: Environments,
        run_dir: Path,
        host: str,
        folder: Path,
        incarnation: str,
        died: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._environments = environments
        self._command = ["--run-dir", str(run_dir), "--host", host, "--parent", str(os.getpid())]
        self._folder = folder
        self._incarnation = incarnation
        self._died = died
        self._generation = 0
        self._asked: dict[int, Callable[[dict[str, Any]], None]] = {}
        self._last_id = 0
        self.path = str(folder / "persister")
        self._listener = listen_unix(self.path)
        self.pid = 0
        self._ready = False
        self._fallen = False  # its connection has ended; it may still be dying
        self._was_ready = False
        self._start()

    @property
    def _mark(self) -> str:
        return f"{self._incarnation}.persister{self._generation}"

    def _start(self) -> None:
        self._generation += 1
        self._ready = False
        self._sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._sock, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE_BYTES)
        self._sock.setblocking(False)
        fds = [other.fileno(), self._listener.fileno()]
        command = [sys.executable, "-P", "-m", "launcher.host.persist.main", "--fd", str(fds[0])]
        command += ["--listener", str(fds[1]), *self._command]
        with open(self._folder / "persister.log", "ab") as log, other:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._environments.pool(self._mark),
                pass_fds=fds,
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._selector.register(self._sock, selectors.EVENT_READ, self._on_readable)

    def ask(self, then: Callable[[dict[str, Any]], None]) -> None:
        """Call ``then`` with what the persister holds: at once with nothing when it is not there."""
        if not self._ready:
            then(NOTHING)
            return
        self._last_id += 1
        try:
            self._sock.send(json.dumps({"op": "holdings", "id": self._last_id}).encode())
        except OSError:
            then(NOTHING)
            return
        self._asked[self._last_id] = then

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._on_death()
            return
        message = json.loads(data)
        if message["op"] == "ready":
            self._ready = True
            return
        then = self._asked.pop(message["id"], None)
        if then is not None:
            then({"address": message["address"], "held": message["held"]})

    def _on_death(self) -> None:
        self._was_ready, self._fallen = self._ready, True
        self._drop()
        self.tick()

    def due(self, now: float) -> float | None:
        """When :meth:`tick` has something to do."""
        return now + _LOOK_S if self._fallen else None

    def tick(self) -> None:
        """Replace one that is dead; one that is stuck in a disk takes its time to die."""
        if not self._fallen or (code := self._process.poll()) is None:
            return
        self._fallen = False
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        if self._was_ready:
            self._start()
        else:  # one that cannot even start is not tried again and again, and ranks must not wait for it
            self._listener.close()
        self._died(f"the persister ended ({why})")
        waiting, self._asked = self._asked, {}
        for then in waiting.values():
            then(NOTHING)

    def _drop(self) -> None:
        self._ready = False
        if self._sock.fileno() >= 0:
            self._selector.unregister(self._sock)
            self._sock.close()

    def close(self) -> None:
        """End it after what it is writing, and wait until it is gone."""
        if self._ready:
            try:
                self._sock.send(b'{"op": "bye"}')
            except OSError:
                self._ready = False
        if not self._ready:
            self._process.kill()
        try:
            self._process.wait(DRAIN_S + 1.0)
        except subprocess.TimeoutExpired:  # the disk is stuck
            self._process.kill()
            process.wait_until(lambda: self._process.poll() is not None, 2.0)
        self._drop()
        self._listener.close()
