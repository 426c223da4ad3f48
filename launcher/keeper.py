"""The process that keeps an embedded Ray cluster alive, and ends it; started by :mod:`launcher.embedded`.

Single-threaded on purpose: the kernel ends a child when the *thread* that started it ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher.embedded import NODE_MARK, TEMP_PREFIX, descendants, node_mark
from launcher.host import process
from launcher.host.child import adopt_orphans, die_with_parent
from launcher.lock import newest_epoch, process_started
from launcher.run import fold
from launcher.store import RunStore, dump, write_atomic
from strategies.errors import ClusterError, PhalanxError

HOST = "127.0.0.1"
HEAD = "head"
OBJECT_STORE_BYTES = 80 * 2**20  # Ray refuses less than 75 MiB; nothing of ours goes through it
SOCKET_PATH_BYTES = 75  # of "/<index>/session_<date>_<pid>/sockets/plasma_store" below the temp dir
STOP_PATIENCE_S = 8.0
ABANDONED_S = 10.0  # a run that is over and has had no heartbeat for so long needs its cluster no more
_READY = "Ray runtime started"
_POLL_S = 0.1

_RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # Every node sees the memory of the whole machine: each would kill workers of its own for the others' sins.
    "RAY_memory_monitor_refresh_ms": "0",
    # A healthy node must survive a loaded machine; a dead one refuses connections at once. Defaults: 3 s, 10 s, 5.
    "RAY_health_check_period_ms": "1500",
    "RAY_health_check_timeout_ms": "15000",
    "RAY_health_check_failure_threshold": "5",
}


@dataclass(kw_only=True, slots=True)
class _Node:
    """One ``ray start --block`` and everything below it."""

    index: int | str
    mark: str
    slots: int
    home: Path
    log: Path
    child: subprocess.Popen[bytes]
    started: int
    ready: bool = False

    def described(self) -> dict[str, Any]:
        """Entry of ``cluster.json``."""
        return {
            "index": self.index,
            "marker": self.mark,
            "home": str(self.home),
            "slots": self.slots,
            "pid": self.child.pid,
            "started": self.started,
            "ready": self.ready,
        }


class _Stopped(Exception):
    """Told to end while still starting."""


class Keeper:
    """Starts, watches and ends one embedded cluster.

    Args:
        run_dir: The run directory it serves.
        nodes: Number of nodes with slots.
        slots: CPUs per node.
        keep_s: Patience without controller and without progress.
    """

    def __init__(self, run_dir: Path, nodes: int, slots: int, keep_s: float) -> None:
        self._paths = RunPaths(run_dir.resolve())
        self._count, self._slots, self._keep_s = nodes, slots, keep_s
        self._nodes: list[_Node] = []
        self._address = f"{HOST}:{_free_port()}"
        self._told = False
        self._temp = Path()

    def run(self) -> int:
        """Keep the cluster until its end; returns the exit code."""
        signal.signal(signal.SIGTERM, self._tell)
        signal.signal(signal.SIGINT, self._tell)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        adopt_orphans()
        code, reason = 0, ""
        try:
            self._temp = _make_temp_dir()
            self._write("starting")
            self._start_all()
            self._write("ready")
            reason = self._watch()
        except _Stopped:
            reason = "told to end while starting"
        except PhalanxError as error:
            code, reason = 1, str(error)
        finally:
            self._end()
            self._write("failed" if code else "ended", reason)
        return code

    def _tell(self, signum: int, frame: object) -> None:
        self._told = True

    # --- starting -------------------------------------------------------------------------------------------------

    def _start_all(self) -> None:
        (self._temp / "owner").write_text(f"{os.getpid()} {process_started(os.getpid())}")
        token = self._temp / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        head = self._launch(HEAD, 0)
        while not _listens(self._address):
            self._look(head)
        waiting = list(range(self._count))
        # A raylet gives up after 30 s of starting: more at once than the machine can start would all fail together.
        at_once = max(6, 2 * (os.cpu_count() or 1))
        while waiting or not all(node.ready for node in self._nodes):
            while waiting and sum(not node.ready for node in self._nodes) < at_once:
                self._launch(waiting.pop(0), self._slots)
            self._look(*self._nodes)

    def _command(self, index: int | str, slots: int) -> list[str]:
        """Command line of one node."""
        # Nodes that share a session directory race for the names of their sockets: a folder for each.
        options = ["--block", "--disable-usage-stats", "--include-log-monitor=false"]
        options += [
            f"--node-ip-address={HOST}",
            f"--node-name=phalanx-{index}",
            f"--temp-dir={self._temp / str(index)}",
        ]
        options += ["--num-gpus=0", f"--num-cpus={slots}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        if index == HEAD:
            port = self._address.rpartition(":")[2]
            options += ["--head", f"--port={port}", "--no-monitor", "--include-dashboard=false"]
        else:
            options += [f"--address={self._address}"]
        return [sys.executable, "-P", "-m", "launcher.ray_backend", "start", *options]

    def _launch(self, index: int | str, slots: int) -> _Node:
        mark = node_mark(self._paths.root, index)
        home = self._temp / str(index)  # where it stands identifies a process that has overwritten its environment
        home.mkdir()
        log = self._temp / f"node-{index}.log"
        auth = {"RAY_AUTH_TOKEN_PATH": str(self._temp / "token")}
        parent = os.getpid()
        with open(log, "wb") as out:
            child = subprocess.Popen(
                self._command(index, slots),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | _RAY_SETTINGS | auth | {NODE_MARK: mark},
                cwd=home,
                start_new_session=True,
                # SIGTERM would be kinder, but a raylet takes half a minute over it when its head has gone first.
                preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent),
            )
        started = process_started(child.pid)
        node = _Node(index=index, mark=mark, slots=slots, home=home, log=log, child=child, started=started)
        self._nodes.append(node)
        return node

    def _look(self, *nodes: _Node) -> None:
        """Let a moment pass, then take in which nodes have become ready.

        Raises:
            ClusterError: One of them has ended.
        """
        if self._told:
            raise _Stopped
        time.sleep(_POLL_S)
        self._reap()
        before = sum(node.ready for node in self._nodes)
        for node in nodes:
            if node.child.returncode is not None and not node.ready:
                raise ClusterError(f"Ray node '{node.index}' ended while it started: {_tail(node.log)}")
            node.ready = node.ready or _READY.encode() in node.log.read_bytes()
        if sum(node.ready for node in self._nodes) != before:
            self._write("starting")

    # --- watching -------------------------------------------------------------------------------------------------

    def _watch(self) -> str:
        """Wait for the end; returns why it came."""
        signs, changed = self._signs_of_life(), time.monotonic()
        while not self._told:
            time.sleep(0.5)
            self._reap()
            if not self._paths.root.is_dir():
                return "the run directory is gone"
            now = self._signs_of_life()
            if now != signs:
                signs, changed = now, time.monotonic()
            idle = time.monotonic() - changed
            if idle > self._keep_s:
                return f"no controller and no step for {self._keep_s:.0f} s"
            if (idle > ABANDONED_S or self._released()) and self._over():
                return "the run is over"
        return "told to end"

    def _signs_of_life(self) -> list[tuple[str, int, int]]:
        """What changes while a controller or a gang lives. Only changes count: no clock but our own is read."""
        signs = []
        for path in [
            *self._paths.controllers.glob("*.beat"),
            *self._paths.controllers.glob("*.json"),
            self._paths.metrics,
        ]:
            try:
                status = path.stat()
            except OSError:
                continue
            signs.append((path.name, status.st_mtime_ns, status.st_size))
        return sorted(signs)

    def _released(self) -> bool:
        epoch = newest_epoch(self._paths)
        return bool(epoch) and (self._paths.controllers / f"{epoch}.released").exists()

    def _over(self) -> bool:
        try:
            return fold(RunStore(self._paths.root).events()).state.terminal
        except (PhalanxError, OSError, RuntimeError):  # a damaged log is the controller's business, not ours
            return False

    def _reap(self) -> None:
        """Collect every ended child; as the subreaper we inherit the orphans of all nodes."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for node in self._nodes:
                if node.child.pid == pid:
                    node.child.returncode = os.waitstatus_to_exitcode(status)

    # --- ending ---------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """End everything below this process. As the subreaper it is the parent of whatever lost its own."""
        for node in self._nodes:
            if node.child.returncode is None:
                node.child.send_signal(signal.SIGTERM)
        self._reap()
        deadline = time.monotonic() + STOP_PATIENCE_S
        while (left := descendants(os.getpid())) and time.monotonic() < deadline + STOP_PATIENCE_S:
            if time.monotonic() > deadline or all(node.child.returncode is not None for node in self._nodes):
                for pid in left:
                    process.send(pid, signal.SIGKILL)
            time.sleep(_POLL_S / 2)
            self._reap()
        if self._temp != Path():
            shutil.rmtree(self._temp, ignore_errors=True)

    def _write(self, state: str, reason: str = "") -> None:
        if not self._paths.root.is_dir():
            return
        record = {
            "version": 1,
            "kind": "local",
            "state": state,
            "reason": reason,
            "address": self._address,
            "token_path": str(self._temp / "token"),
            "temp_dir": str(self._temp),
            "keeper": {"pid": os.getpid(), "started": process_started(os.getpid())},
            "nodes": [node.described() for node in self._nodes],
        }
        write_atomic(self._paths.cluster, dump(record))


def _make_temp_dir() -> Path:
    """A private folder whose path is short enough for Unix sockets below it; folders of dead keepers are removed.

    Raises:
        ClusterError: No folder for temporary files has a short enough path.
    """
    for base in dict.fromkeys([tempfile.gettempdir(), "/tmp"]):
        if len(base) + len(TEMP_PREFIX) + 9 + SOCKET_PATH_BYTES <= 107 and os.access(base, os.W_OK):
            _sweep(Path(base))
            return Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=base))
    raise ClusterError(
        f"The path of the folder for temporary files, {tempfile.gettempdir()}, is too long for Unix sockets.",
        hint="Set TMPDIR to a folder with a short path, for example TMPDIR=/tmp.",
    )


def _sweep(base: Path) -> None:
    for owner in base.glob(f"{TEMP_PREFIX}*/owner"):
        try:
            pid, started = owner.read_text().split()
            mine = owner.stat().st_uid == os.getuid()
        except (OSError, ValueError):
            continue
        if mine and process_started(int(pid)) != int(started):
            shutil.rmtree(owner.parent, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False


def _tail(log: Path, lines: int = 3) -> str:
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return "it left no log"
    return " | ".join(line.strip() for line in text.splitlines()[-lines:] if line.strip()) or "it left an empty log"
