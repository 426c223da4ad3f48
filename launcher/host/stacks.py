"""Where do the ranks of this node stand? Asked when the gang makes no progress; answered without their help.

How far a rank has come in every group it communicates with is read from its memory (:mod:`jobs.course`).
SIGUSR1 makes a rank of ours write the stacks of its threads to its log: from a C handler, so that one that holds the
interpreter's lock answers, too. One that is stopped cannot; the kernel's word for its state says so. Where the thread
that trains waits for the one that reads ahead (:mod:`jobs.data.ahead`), it stands where that one does.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.course import progress_of
from launcher.host.logs import RankLogs

ANSWER_S = 0.5
_MAX_TEXT = 12000  # a hundred frames, which is all that faulthandler writes
_MAX_DUMP_BYTES = 128 << 10
_OURS = "jobs/worker.py"
_WAITS_FOR_READER = re.compile(r'jobs/data/ahead\.py", line \S+ in take$')
_READER = re.compile(r'jobs/data/ahead\.py", line \S+ in _serve$')
_INSTALLED = re.compile(r'File "[^"]*/site-packages/')


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A rank that was asked.

    Attributes:
        rank: Global rank.
        pid: Its process.
        log: Where it writes.
        offset: Size of the log before it was asked; None when that cannot be seen.
    """

    rank: int
    pid: int
    log: Path
    offset: int | None


class Stacks:
    """Asks the ranks of a node where they stand, and collects the answers a little later.

    Args:
        logs: Where they write.
    """

    def __init__(self, logs: RankLogs) -> None:
        self._logs = logs
        self._open: list[Question] = []
        self._due: float | None = None

    @property
    def due(self) -> float | None:
        """When :meth:`collect` has something to do (monotonic seconds)."""
        return self._due

    def ask(self, ranks: Iterable[tuple[int, int, Path]], now: float) -> None:
        """Ask ranks, given as (rank, process id, log)."""
        self._open = []
        for rank, pid, log in ranks:
            offset = self._logs.size(log)
            try:
                _poke(pid)
            except OSError:
                continue
            self._open.append(Question(rank=rank, pid=pid, log=log, offset=offset))
        self._due = now + ANSWER_S

    def collect(self, now: float) -> list[dict[str, Any]]:
        """The answers, once they are due.

        ``rank``, ``state`` (the kernel's letter), ``stack`` (may be empty) and ``progress`` (None when unknown).
        """
        if self._due is None or now < self._due:
            return []
        asked, self._open, self._due = self._open, [], None
        return [answer(one, self._written(one)) for one in asked]

    def _written(self, one: Question) -> str:
        return "" if one.offset is None else self._logs.text_from(one.log, one.offset, _MAX_DUMP_BYTES)


def _poke(pid: int) -> None:
    """One that has not come to where it takes the signal, as in its imports, would die of it."""
    status = Path("/proc", str(pid), "status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    if caught >> (signal.SIGUSR1 - 1) & 1:
        os.kill(pid, signal.SIGUSR1)


def answer(one: Question, written: str) -> dict[str, Any]:
    """Where a rank stands that was asked and has ``written`` since, see :meth:`Stacks.collect`."""
    progress = progress_of(one.pid)
    stack = main_stack(written)
    state = state_of(one.pid)
    if state == "S" and any(map(_WAITS_FOR_READER.search, stack.splitlines())) and "D" in states_of_tasks(one.pid):
        state = "D"  # the kernel holds the reader, and with it the rank
    return {
        "rank": one.rank,
        "state": state,
        "stack": stack[:_MAX_TEXT],
        "progress": progress and progress.to_json(),
    }


def state_of(pid: int) -> str:
    """The kernel's letter for a process: R running, S sleeping, D in the disk or a driver, T stopped; "" when gone."""
    return _letter(Path("/proc", str(pid), "stat"))


def states_of_tasks(pid: int) -> set[str]:
    """The letters for all threads of a process."""
    return {_letter(path) for path in Path("/proc", str(pid), "task").glob("*/stat")}


def _letter(stat: Path) -> str:
    try:
        line = stat.read_text(errors="replace")
    except OSError:
        return ""
    return line[line.rindex(")") + 2 :][:1]


def main_stack(text: str) -> str:
    """The stack of the thread that trains, innermost frame first, out of what the rank wrote.

    Where it waits for what is read ahead, the frames of the reader come first: they are what it waits in.
    """
    sections: list[list[str]] = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            sections.append([])
        elif sections and line.startswith("  File "):
            sections[-1].append(_INSTALLED.sub('File "', line.strip()))
    ours = [section for section in sections if any(_OURS in line for line in section)]
    main = (ours or sections or [[]])[-1]
    waits = any(map(_WAITS_FOR_READER.search, main))
    reader = next((some for some in sections if waits and any(map(_READER.search, some))), [])
    return "\n".join(reader + main)
