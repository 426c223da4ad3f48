"""One controller per run: create-exclusive records, one per epoch, that survive a killed holder.

``flock`` does not cross hosts, and a lock *file* outlives kill -9. So holding is a record ``controllers/E.json`` that
only one contender can create, and being alive is either provable (same machine: the process exists) or observed (the
holder's heartbeat file changes). Nobody compares clocks of two machines.

On a share the record is the server's to give. What a client has seen before it may be shown again, and that a file is
not there, too (:mod:`launcher.share`). So every beat changes the folder, which makes :meth:`ControllerLock.lost` true a
beat late at most, and a heartbeat is watched for as much longer as an old one may be shown. A controller that has not
noticed yet does no harm: agents and checkpoints ask for the epoch themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher import share
from launcher.store import create_exclusive
from strategies.errors import ResumeRefused, StorageError

BEAT_S = 1.0
SILENCE_S = 8.0  # a holder on another machine that does not beat for so long is dead


class ControllerLock:
    """The right to control a run in one epoch.

    Args:
        paths: The run's files.
        epoch: The epoch that was won.
    """

    def __init__(self, paths: RunPaths, epoch: int) -> None:
        self._paths = paths
        self.epoch = epoch
        self._run = secret_of(paths)
        self._count = 0
        self._last_beat = 0.0

    @classmethod
    def acquire(
        cls,
        paths: RunPaths,
        *,
        silence_s: float = SILENCE_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> ControllerLock:
        """Win the next epoch.

        Raises:
            ResumeRefused: Another controller is alive; nothing was written.
            StorageError: The record cannot be written; nobody has won.
        """
        while True:
            newest = newest_epoch(paths)
            if newest and holder_alive(paths, newest, silence_s=silence_s, sleep=sleep):
                holder = _read(paths.controllers / f"{newest}.json")
                raise ResumeRefused(
                    f"Run '{paths.root.name}' already has a live controller "
                    f"(epoch {newest}, process {holder.get('pid')} on {holder.get('host')}).",
                    hint=f"Follow it: phalanx logs {paths.root.name} -f. To stop it: phalanx cancel {paths.root.name}",
                )
            if create_exclusive(paths.controllers / f"{newest + 1}.json", json.dumps(identity()).encode()):
                lock = cls(paths, newest + 1)
                lock.beat()
                return lock

    def beat(self) -> None:
        """Show that the holder lives; cheap, call it in every turn of a loop."""
        now = time.monotonic()
        if now - self._last_beat < BEAT_S and self._count:
            return
        self._last_beat = now
        self._count += 1
        with contextlib.suppress(OSError):  # a full disk must not end the run; the holder's process still proves life
            (self._paths.controllers / f"{self.epoch}.beat").write_text(str(self._count))
            share.look_again(self._paths.controllers, f"{self.epoch}.look")

    def lost(self) -> bool:
        """Whether a later epoch exists, or another run: this controller must stop at once, and touch nothing."""
        return (self._paths.controllers / f"{self.epoch + 1}.json").exists() or self.displaced()

    def displaced(self) -> bool:
        """Whether what is there is not this run's directory any more."""
        return displaced(self._paths, self._run)

    def release(self) -> None:
        """Let the next controller in without waiting. On a full disk it waits until this process is seen to be gone."""
        if self.displaced() or not (self._paths.controllers / f"{self.epoch}.json").exists():
            return  # the directory was moved, and what is there now, if anything, is another run's
        with contextlib.suppress(StorageError):
            create_exclusive(self._paths.controllers / f"{self.epoch}.released", b"{}")


def displaced(paths: RunPaths, secret: bytes) -> bool:
    """Whether what stands where the run with this secret has its directory is something else.

    It may be moved while the run lives, deleted or unmounted. Then another run of the same name may be begun in its
    place, or ranks that know no better make a folder there, without a secret, to write in. Where there is no folder, or
    it cannot be read, nothing follows from that.
    """
    try:
        found = paths.secret.read_bytes().strip()
    except FileNotFoundError:
        return secret != b"" and paths.root.is_dir()
    except OSError:
        return False
    return secret != b"" and found not in (b"", secret)


def newest_epoch(paths: RunPaths) -> int:
    """Highest epoch that any controller has won; 0 for none."""
    if not paths.controllers.is_dir():
        return 0
    return max((int(path.stem) for path in paths.controllers.glob("*.json") if path.stem.isdigit()), default=0)


def controlled(paths: RunPaths, *, silence_s: float = SILENCE_S) -> bool:
    """Whether a live controller owns the run now. May observe a heartbeat for ``silence_s``."""
    newest = newest_epoch(paths)
    return bool(newest) and holder_alive(paths, newest, silence_s=silence_s)


def holder_alive(
    paths: RunPaths,
    epoch: int,
    *,
    silence_s: float = SILENCE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether the controller of ``epoch`` lives.

    A process of the same machine and process namespace is looked up; any other is alive if its heartbeat changes
    while we watch.
    """
    if (paths.controllers / f"{epoch}.released").exists():
        return False
    holder, me = _read(paths.controllers / f"{epoch}.json"), identity()
    if holder.get("machine") == me["machine"]:
        return process_started(int(holder["pid"])) == int(holder["started"])
    beat = paths.controllers / f"{epoch}.beat"
    first = beat.read_text() if beat.exists() else ""
    silence_s += share.stale_s(paths.controllers)
    waited = 0.0
    while waited < silence_s:
        sleep(BEAT_S / 2)
        waited += BEAT_S / 2
        if beat.exists() and beat.read_text() != first:
            return True
    return False


def identity() -> dict[str, Any]:
    """What identifies this process among all processes that ever ran."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": machine(), "pid": pid, "started": process_started(pid)}


def machine() -> str:
    """Identity of this boot of this machine and of the process namespace: where a process id means the same."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return f"{boot.read_text().strip() if boot.exists() else socket.gethostname()} {namespace}"


def process_started(pid: int) -> int:
    """Start time of a process in clock ticks since boot; 0 if there is none (a zombie counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def secret_of(paths: RunPaths) -> bytes:
    """What tells a run from all others; empty where it cannot be read."""
    try:
        return paths.secret.read_bytes().strip()
    except OSError:
        return b""


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
