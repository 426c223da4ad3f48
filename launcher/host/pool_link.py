"""The agent's side of the warm pool: starts it, talks to it without ever blocking, replaces it when it dies."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.host import process
from launcher.host.environment import Environments
from launcher.host.logs import tail
from launcher.host.pool import MAX_MESSAGE_BYTES
from launcher.host.sweep import Sweep

_LOOK_S = 0.05  # at what is left of a dead pool


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolEvents:
    """What the agent does when the pool has something to say."""

    ready: Callable[[str], None]
    spawned: Callable[[str, int, str], None]
    failed: Callable[[str, str], None]
    exited: Callable[[str, int | None, int | None], None]
    died: Callable[[str], None]


class PoolLink:
    """A pool and the connection to it.

    Args:
        selector: The agent's loop; callbacks take no argument.
        environments: Makes the pool's environment.
        events: Callbacks: ``ready(reason)``, ``spawned(key, pid, fresh)``, ``failed(key, reason)``,
            ``exited(key, code, signal)``, ``died(why)``. After ``died`` no process of the dead pool is left, and a new
            pool is being started.
        folder: Where the pool works and logs.
        incarnation: The agent's; part of the mark.
        warm: ``module:function`` that warms the pool up.
        target: ``module:function`` that a rank runs.
    """

    def __init__(
        self,
        *,
        selector: selectors.BaseSelector,
        environments: Environments,
        events: PoolEvents,
        folder: Path,
        incarnation: str,
        warm: str,
        target: str,
    ) -> None:
        self._selector = selector
        self._environments = environments
        self._events = events
        self._folder = folder
        self._incarnation = incarnation
        self._warm = warm
        self._target = target
        self._generation = 0
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._running: dict[str, tuple[int, int]] = {}  # key of a rank: its process id and birth
        self._asked_at: float | None = None
        self._sweep: Sweep | None = None  # the pool is dead, and what it left has not ended
        self._was_ready = False  # when it died
        self.ready = False
        self.pid = 0
        self._start()

    @property
    def mark(self) -> str:
        """Mark of the living pool and of its ranks."""
        return f"{self._incarnation}.{self._generation}"

    @property
    def log(self) -> Path:
        """What the pool itself printed."""
        return self._folder / "pool.log"

    def _start(self) -> None:
        self._generation += 1
        self.ready = False
        self._asked_at = None
        self._running.clear()
        # The rank's environment fits into one datagram only if the buffer is larger than the system's default.
        self._sock, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.setblocking(False)
        for end in (self._sock, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_MESSAGE_BYTES)
        command = [sys.executable, "-P", "-m", "launcher.host.pool"]
        command += ["--fd", str(other.fileno()), "--parent", str(os.getpid())]
        command += ["--warm", self._warm, "--target", self._target]
        with open(self.log, "ab") as log, other:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                env=self._environments.pool(self.mark),
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._selector.register(self._sock, selectors.EVENT_READ, self._on_ready)

    def spawn(self, message: Mapping[str, Any], fds: Mapping[str, int]) -> None:
        """Start a rank; takes the descriptors over. The pool must be ready."""
        data = json.dumps({"op": "spawn", "fds": list(fds)} | dict(message)).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            for fd in fds.values():
                os.close(fd)
            reason = f"its environment and command take {len(data)} bytes, more than {MAX_MESSAGE_BYTES}"
            self._events.failed(str(message["key"]), reason)
            return
        self._put(data, list(fds.values()))

    def kill(self, key: str, signum: int) -> None:
        """Send a signal to a rank and its process group."""
        self._put(json.dumps({"op": "kill", "key": key, "signal": int(signum)}).encode(), [])

    def ask(self, now: float) -> None:
        """Ask for a sign of life, unless one is awaited."""
        if self._asked_at is None and self._sweep is None:
            self._asked_at = now
            self._put(b'{"op": "ask"}', [])

    def owes_s(self, now: float) -> float:
        """For how long an answer has been awaited."""
        return 0.0 if self._asked_at is None else now - self._asked_at

    @property
    def left(self) -> tuple[int, ...]:
        """What a dead pool has left and is still there."""
        return self._sweep.left if self._sweep is not None else ()

    def due(self, now: float) -> float | None:
        """When :meth:`tick` has something to do."""
        return None if self._sweep is None else now + _LOOK_S

    def _put(self, data: bytes, fds: list[int]) -> None:
        if self._sweep is not None:  # there is no pool; only signals come here then, and the sweep sends its own
            return
        self._queue.append((data, fds))
        self._flush()

    def _flush(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            try:
                socket.send_fds(self._sock, [data], fds)
            except BlockingIOError:
                break
            except OSError:  # the pool is gone; reading will tell, and the ranks in the queue are reported then
                break
            self._queue.popleft()
            for fd in fds:
                os.close(fd)
        wants = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._queue else 0)
        if self._selector.get_key(self._sock).events != wants:
            self._selector.modify(self._sock, wants, self._on_ready)

    def _on_ready(self) -> None:
        self._flush()
        for _ in range(64):
            try:
                data = self._sock.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._on_death()
                return
            self._dispatch(json.loads(data))

    def _dispatch(self, message: dict[str, Any]) -> None:
        op = message["op"]
        self._asked_at = None
        if op == "ready":
            self.ready = True
            self._events.ready(message["reason"])
        elif op == "spawned":
            self._running[message["key"]] = message["pid"], process.birth(message["pid"])
            self._events.spawned(message["key"], message["pid"], message["fresh"])
        elif op == "failed":
            self._events.failed(message["key"], message["reason"])
        elif op == "exit":
            self._running.pop(message["key"], None)
            self._events.exited(message["key"], message["code"], message["signal"])

    def _on_death(self) -> None:
        self._was_ready = self.ready
        self._drop()
        self._sweep = Sweep(self.mark, self._running.values())

    def tick(self) -> None:
        """When nothing is left of a dead pool, say so and start another one."""
        if self._sweep is None or not self._sweep.done or (code := self._process.poll()) is None:
            return
        self._sweep = None
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        reason = f"the warm pool ended ({why})"
        if not self._was_ready:
            reason = f"{reason} while it warmed up: {tail(self.log, 1000).strip()}"
            self._warm = ""  # the next one starts ranks as fresh processes, so that it cannot die of the same import
        self._start()
        self._events.died(reason)

    def _drop(self) -> None:
        self.ready = False
        self._selector.unregister(self._sock)
        self._sock.close()
        for _, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()

    def force(self) -> None:
        """Kill a pool that does not answer; the kernel then kills its ranks."""
        process.send(self.pid, signal.SIGKILL)

    def close(self, timeout_s: float = 5.0) -> None:
        """End the pool and everything below it, and wait until it is gone."""
        if self._sweep is None:
            self._drop()
        else:
            self._sweep.stop()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            process.wait_until(lambda: self._process.poll() is not None, timeout_s)
        process.kill_marked(f"{self._incarnation}.")
