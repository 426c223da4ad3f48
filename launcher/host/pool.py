"""The warm pool: one plain process per node that has imported everything a rank needs, and forks ranks from it.

Imports are most of the time that a restart takes, so they are done once, ahead. Forking is safe as long as this
process has one kernel task and has not touched a device; both are checked before every fork, and if they do not hold,
the rank is started as a fresh process instead. The pool is the parent of every rank of its node, of users' scripts
too, so that there is one place that reaps, and one that kills:

- when the agent ends (end of file on the socket), every descendant is killed, then the pool ends;
- when the pool ends, the kernel kills the ranks;
- when a rank ends, the rest of its process group and what it left behind in other sessions is killed.

Started by the agent as ``python -P -m launcher.host.pool --fd N --parent PID --warm M:F --target M:F``. Messages are
JSON datagrams on a sequenced-packet socket; file descriptors travel with them:

``{"op": "spawn", "key", "name", "env", "cwd", "argv": null | [...], "fds": ["log", "report", "order", "store"]}``,
``{"op": "kill", "key", "signal"}``, ``{"op": "ask"}``; answers ``ready`` (``reason``), ``spawned`` (``key``, ``pid``,
``fresh``: reason or empty), ``failed`` (``key``, ``reason``), ``exit`` (``key``, ``pid``, ``code``, ``signal``) and
``here``.
"""

from __future__ import annotations

import argparse
import array
import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from launcher.host import accelerator, child, process

MAX_MESSAGE_BYTES = 200_000
MAX_FDS = 4
_ORPHAN_GRACE_S = 2.0

COLD = "the pool was told not to warm up"
"""Why a cold pool forks nothing; no failure of the pool."""


def unsafe_to_fork() -> str:
    """Why forking this process now would be unsafe; empty when it is safe.

    A process that has only asked NVML what devices there are is safe, as torch holds, too: no context was made.
    """
    tasks = len(os.listdir("/proc/self/task"))
    if tasks != 1:
        return f"the pool has {tasks} kernel tasks instead of 1"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised in the pool"
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if accelerator.in_contact(target):
            return f"the pool has opened {target}"
    return ""


class Pool:
    """The pool's loop.

    Args:
        sock: Connection to the agent.
        target: ``module:function`` that a warm rank runs.
        reason: Why ranks are not forked from here; empty when the warm-up went well.
    """

    def __init__(self, sock: socket.socket, *, target: str, reason: str) -> None:
        self._sock = sock
        self._target = target
        self._reason = reason
        self._ranks: dict[int, str] = {}
        self._orphans: dict[int, float] = {}
        self._wakeup, self._wakeup_write = socket.socketpair()
        self._stopping = False

    def serve(self) -> None:
        """Run until the agent ends or SIGTERM arrives; then kill every descendant."""
        self._watch_signals()
        gc.collect()
        gc.freeze()
        self._send({"op": "ready", "reason": "" if self._reason == COLD else self._reason})
        poll = select.poll()  # select() takes no descriptor above 1,023, and an actor may have as many
        for end in (self._sock, self._wakeup):
            poll.register(end, select.POLLIN)
        while not self._stopping:
            readable = {fd for fd, _ in poll.poll(100 if self._orphans else None)}
            if self._wakeup.fileno() in readable:
                self._wakeup.recv(4096)
                self._reap()
            if self._sock.fileno() in readable:
                self._receive()
            self._kill_late_orphans()
        self._end()

    def _watch_signals(self) -> None:
        for end in (self._wakeup, self._wakeup_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _stop(self, *_: Any) -> None:
        self._stopping = True

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._sock.send(json.dumps(message).encode())
        except OSError:
            self._stopping = True

    def _receive(self) -> None:
        try:
            data, fds = _receive_with_fds(self._sock)
        except OSError:
            data, fds = b"", []
        if not data:
            self._stopping = True
            return
        message = json.loads(data)
        if message["op"] == "spawn":
            self._spawn(message, dict(zip(message["fds"], fds, strict=True)))
        elif message["op"] == "kill":
            self._kill(message["key"], message["signal"])
        elif message["op"] == "ask":
            self._send({"op": "here"})

    def _kill(self, key: str, signum: int) -> None:
        for pid, known in self._ranks.items():
            # The leader was not reaped yet, so neither its id nor the group's can be another's by now. A rank that has
            # not yet become the leader of its group is found by its own id.
            if known == key and not process.send_group(pid, signum):
                process.send(pid, signum)

    def _spawn(self, message: dict[str, Any], fds: dict[str, int]) -> None:
        fresh = "" if message["argv"] is not None else (self._reason or unsafe_to_fork())
        try:
            if message["argv"] is not None or fresh:
                pid = self._start(message, fds)
            else:
                pid = self._fork(message, fds)
            self._ranks[pid] = message["key"]
            self._send({"op": "spawned", "key": message["key"], "pid": pid, "fresh": fresh})
        except OSError as error:
            self._send({"op": "failed", "key": message["key"], "reason": str(error)})
        for fd in fds.values():
            os.close(fd)

    def _fork(self, message: dict[str, Any], fds: dict[str, int]) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                self._become_rank(message, fds, parent)
            except BaseException:
                traceback.print_exc()
                os._exit(child.EXIT_CANNOT_START)
            child.run(self._target)
        return pid

    def _become_rank(self, message: dict[str, Any], fds: dict[str, int], parent: int) -> None:
        child.die_with_parent(signal.SIGKILL, parent)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for sock in (self._sock, self._wakeup, self._wakeup_write):
            sock.close()
        log = fds.pop("log")
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ.clear()
        os.environ.update(_rank_environment(message, fds) | {child.RANK_PID: str(os.getpid())})
        os.chdir(message["cwd"])
        child.set_name(message["name"])
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]

    def _start(self, message: dict[str, Any], fds: dict[str, int]) -> int:
        environment = _rank_environment(message, fds)
        kept = [fd for name, fd in fds.items() if name != "log"]
        for fd in kept:
            os.set_inheritable(fd, True)
        if message["argv"] is not None:
            head = [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), message["cwd"], "--exec"]
            command = [*head, *message["argv"]]
        else:
            head = [sys.executable, "-P", "-m", child.__name__, str(os.getpid()), message["cwd"], "--target"]
            command = [*head, self._target]
        actions = [(os.POSIX_SPAWN_DUP2, fds["log"], 1), (os.POSIX_SPAWN_DUP2, fds["log"], 2)]
        reset = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ]
        return os.posix_spawn(
            sys.executable, command, environment, file_actions=actions, setsid=True, setsigdef=reset, setsigmask=[]
        )

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            key = self._ranks.pop(pid, None)
            if key is not None:
                process.send_group(pid, signal.SIGKILL)
            self._orphans.pop(pid, None)
            _, status = os.waitpid(pid, 0)
            self._end_orphans()
            if key is not None:
                code = os.waitstatus_to_exitcode(status)
                ending = {"code": code, "signal": None} if code >= 0 else {"code": None, "signal": -code}
                self._send({"op": "exit", "key": key, "pid": pid} | ending)

    def _children(self) -> list[int]:
        own = os.getpid()
        try:
            return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]
        except OSError:  # a kernel without this file
            return [pid for pid in process.all_pids() if process.parent_and_session(pid)[0] == own]

    def _end_orphans(self) -> None:
        """Ask what ended ranks left behind to end; what belongs to a living rank stays."""
        for pid in self._children():
            if pid in self._ranks or pid in self._orphans:
                continue
            if not self._belongs_to_living_rank(pid):
                process.send(pid, signal.SIGTERM)
                self._orphans[pid] = time.monotonic() + _ORPHAN_GRACE_S

    def _belongs_to_living_rank(self, pid: int) -> bool:
        if process.parent_and_session(pid)[1] in self._ranks:
            return True
        # A process that was forked, not executed, still shows the pool's environment: whose it is remains unknown.
        owner = process.environment(pid).get(child.RANK_PID)
        return bool(self._ranks) if owner is None else int(owner) in self._ranks

    def _kill_late_orphans(self) -> None:
        for pid, deadline in self._orphans.items():
            if time.monotonic() > deadline:
                process.send(pid, signal.SIGKILL)

    def _end(self) -> None:
        """Kill every descendant: those of a killed rank become children of the pool and are met in the next round."""
        self._sock.close()
        for pid in self._ranks:
            process.send_group(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10.0
        while (children := self._children()) and time.monotonic() < deadline:
            for pid in children:
                process.send(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                continue
            time.sleep(0.01)


def _receive_with_fds(sock: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, which a program that is executed from here does not inherit by accident."""
    # socket.recv_fds ignores its flags in Python 3.11.
    room = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(MAX_MESSAGE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds)


def _rank_environment(message: dict[str, Any], fds: dict[str, int]) -> dict[str, str]:
    environment: dict[str, str] = dict(message["env"])
    environment["PHALANX_REPORT_FD"] = str(fds.get("report", -1))
    environment["PHALANX_STORE_FD"] = str(fds.get("store", -1))
    environment["PHALANX_ORDER_FD"] = str(fds.get("order", -1))
    return environment


def _warm_up(function: str) -> str:
    """Run the warm-up; returns why ranks cannot be forked, empty when they can."""
    if not function:
        return COLD
    try:
        child.resolve(function)()
    except Exception as error:
        traceback.print_exc()
        return f"warm-up failed: {type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Entry point of the pool's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--warm", default="jobs.warm:warm")
    parser.add_argument("--target", default="jobs.worker:main")
    args = parser.parse_args()
    # SIGTERM and not SIGKILL: the pool still has to end the descendants of its ranks, which no parent's death reaches.
    child.die_with_parent(signal.SIGTERM, args.parent)
    child.adopt_orphans()
    sock = socket.socket(fileno=args.fd)
    sock.set_inheritable(False)
    child.set_name("phalanx:pool")
    reason = _warm_up(args.warm)
    Pool(sock, target=args.target, reason=reason).serve()


if __name__ == "__main__":
    main()
