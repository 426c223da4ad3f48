"""Logs of the ranks of one node: where they are, how large they may grow, how to read a piece of one.

They stay on the node, in a private folder. Only rank 0 writes straight into the run directory, and the first rank of
the node that fails is copied there. Whatever touches the run directory does so :mod:`launcher.host.beside`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from jobs.paths import RunPaths
from launcher.host.beside import Beside

MAX_LOG_BYTES = 64 << 20
TAIL_BYTES = 4096
_MAX_COPY_BYTES = 1 << 20
_MAX_PIECE_BYTES = 128 << 10
KEPT_ATTEMPTS = 8
_NO_ANSWER = "the run directory does not answer"

T = TypeVar("T")


class RankLogs:
    """The log files of one node.

    Args:
        paths: The run directory.
        node: The node's name.
        beside: Does what touches the run directory.
        parent: Folder for the private folder; the system's temporary folder by default.
        max_bytes: Size at which a log is cut to its newest half.
    """

    def __init__(
        self,
        paths: RunPaths,
        node: str,
        beside: Beside,
        *,
        parent: str | None = None,
        max_bytes: int = MAX_LOG_BYTES,
    ) -> None:
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in f"{paths.root.name}-{node}")[:80]
        # The place of the run is in the name, so that only earlier agents of this very node and run are swept away.
        place = hashlib.sha256(f"{paths.root.absolute()}\n{node}".encode()).hexdigest()[:12]
        prefix = f"phalanx-{name}-{place}-"
        _sweep(Path(parent or tempfile.gettempdir()), prefix)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        self._paths = paths
        self._beside = beside
        self._max_bytes = max_bytes

    def _at(self, path: Path, work: Callable[[], T], otherwise: T) -> T:
        """Do something with a log: here, or beside where it lies in the run directory."""
        return work() if path.is_relative_to(self.folder) else self._beside.do(work, otherwise)

    def path(self, attempt: int, rank: int) -> Path:
        """Where the log of a rank is written."""
        return self._paths.rank_log(attempt, 0) if rank == 0 else self._local(attempt, rank)

    def _local(self, attempt: int, rank: int) -> Path:
        return self.folder / str(attempt) / f"rank-{rank}.log"

    def open(self, attempt: int, rank: int) -> tuple[int, Path]:
        """Open a log for appending; falls back to the node when the run directory cannot be written."""
        path, local = self.path(attempt, rank), self._local(attempt, rank)
        try:
            fd = self._at(path, lambda: _open_append(path), -1)  # one that comes too late stays open: one for a hang
        except OSError:
            fd = -1
        return (fd, path) if fd >= 0 else (_open_append(local), local)

    def publish(self, attempt: int, rank: int, source: Path) -> None:
        """Copy the end (1 MiB) of a log to the run directory, if it is not there. A full disk is no error here."""
        target = self._paths.rank_log(attempt, rank)
        if target != source:
            self._beside.do(lambda: _copy_end(source, target), None)

    def limit(self, path: Path) -> None:
        """Cut a log that has grown too large to its newest half; what is written meanwhile may be lost."""
        self._at(path, lambda: self._limit(path), None)

    def _limit(self, path: Path) -> None:
        try:
            if path.stat().st_size > self._max_bytes:
                data, _, _ = read_piece(path, -self._max_bytes // 2, self._max_bytes // 2)
                os.truncate(path, 0)
                with open(path, "ab") as file:
                    file.write(b"[the older half of this log was cut]\n" + data)
        except OSError:
            return

    def tail(self, path: Path) -> str:
        """The end of a log as text; empty when it cannot be read."""
        return self._at(path, lambda: tail(path), "")

    def piece_of(self, path: Path, offset: int, limit: int) -> dict[str, object]:
        """The answer to a ``tail`` request: ``data``, ``offset`` where it begins, ``next`` and ``size`` in bytes."""
        return self._at(path, lambda: _piece_of(path, offset, limit), _nothing(_NO_ANSWER))

    def size(self, path: Path) -> int | None:
        """How large a log is, in bytes; None when it cannot be seen."""
        return self._at(path, lambda: _size_of(path), None)

    def text_from(self, path: Path, offset: int, limit: int) -> str:
        """At most ``limit`` bytes of a log from ``offset``, as text; empty when they cannot be read."""
        return self._at(path, lambda: _text(path, offset, limit), "")

    def forget_old_attempts(self, newest: int) -> None:
        """Delete the logs of all but the last few attempts."""
        for folder in self.folder.iterdir():
            if folder.name.isdigit() and int(folder.name) <= newest - KEPT_ATTEMPTS:
                shutil.rmtree(folder, ignore_errors=True)

    @property
    def has_any(self) -> bool:
        """Whether a rank has written here."""
        return any(folder.name.isdigit() for folder in self.folder.iterdir())

    def remove(self) -> None:
        """Delete the private folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove what agents that were killed have left; only what is ours, and only folders."""
    for path in parent.glob(f"{prefix}*"):
        if not path.is_symlink() and path.is_dir() and path.stat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)


def _open_append(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def read_piece(path: Path, offset: int, limit: int) -> tuple[bytes, int, int]:
    """Read at most ``limit`` bytes from ``offset``; a negative offset counts from the end.

    Returns:
        The bytes, the offset at which they begin and the size of the file.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size + offset) if offset < 0 else min(offset, size)
        file.seek(start)
        return file.read(max(0, limit)), start, size


def tail(path: Path, limit: int = TAIL_BYTES) -> str:
    """The end of a log as text; empty when it cannot be read."""
    return _text(path, -limit, limit)


def _text(path: Path, offset: int, limit: int) -> str:
    try:
        return read_piece(path, offset, limit)[0].decode(errors="replace")
    except OSError:
        return ""


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _copy_end(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        data, _, _ = read_piece(source, -_MAX_COPY_BYTES, _MAX_COPY_BYTES)
        target.write_bytes(data)
    except OSError:
        return


def _piece_of(path: Path, offset: int, limit: int) -> dict[str, object]:
    try:
        data, start, size = read_piece(path, offset, min(limit, _MAX_PIECE_BYTES))
    except OSError as error:
        return _nothing(error.strerror or "unreadable")
    return {"data": data.decode(errors="replace"), "offset": start, "next": start + len(data), "size": size}


def _nothing(why: str) -> dict[str, object]:
    return {"data": "", "offset": 0, "next": 0, "size": 0, "error": why}
