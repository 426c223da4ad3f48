"""What a rank tells its agent: one JSON object per line, on an inherited file descriptor.

Kinds, with their fields beside ``kind`` and ``time`` (UTC seconds):

``started``     the process runs our code: ``pid``
``built``       the engine is built, or, to compute only, what needs none; in the seconds of :mod:`jobs.build_time`:
                ``device_s``, ``communicators_s`` and ``engine_s``
``restored``    state is in place: ``step`` (next step to run), ``seconds``; in bytes of tensors, what the rank has
                read from the checkpoint and got from other ranks: ``read_bytes``, ``received_bytes``
``training``    every rank is ready and the first step begins: ``step``, and of how many ``micro_batches`` it is made
``step``        an optimizer step is done: ``step``, and what comes ``next``: ``step``, ``evaluate``, ``save`` or
                ``finish``; how many ``seconds`` it took, in how many of them the rank did not wait for others
                (``own_s``), in how many of those it had no core to run on (``queued_s``) or waited for its samples
                (``data_s``); after how many steps the state is copied into memory (``copies_every``); of how many
                ``micro_batches`` the step after it is made (sent by every rank; again, with the same ``step`` and
                ``next`` alone, when a checkpoint is saved and after every batch of an evaluation)
``checkpoint``  a checkpoint is committed (sent by rank 0): ``step``, ``path``, ``bytes``, ``written_bytes``,
                ``stall_s``
``unsaved``     a checkpoint could not be written, or is late, and the ranks go on, if only to try again (sent by rank
                0): ``step``, ``reason``, and for how many seconds they stood still for that (``stall_s``)
``rejected``    a checkpoint failed verification: ``path``, ``reason``
``blow_up``     the numbers of a step cannot be right, nothing of it is kept: ``step``, ``why``, and of how many
                ``samples`` it was made
``fault``       an injected fault fires now: ``fault``
``error``       an exception ends the rank: ``type``, ``message``, ``traceback``, ``step``, ``exit_code``
``done``        the rank has finished its job, or leaves as it was asked to: ``step``

Pure: no torch, no ray. A report is at most :data:`MAX_LINE_BYTES`, so that a write to the pipe is atomic.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

MAX_LINE_BYTES = 4000  # below PIPE_BUF (4096 on Linux): a line is never torn by another writer of the same pipe


class Reporter:
    """Writes reports; silent when there is nobody to report to.

    Args:
        fd: File descriptor of a pipe, or -1.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, kind: str, **fields: Any) -> None:
        """Send one report. A vanished reader is ignored: the agent's death is the launcher's business."""
        if self._fd < 0:
            return
        try:
            os.write(self._fd, encode({"kind": kind, "time": time.time(), **fields}))
        except (BrokenPipeError, OSError):
            self._fd = -1


def encode(report: dict[str, Any]) -> bytes:
    """One line; the longest text field is cut in the middle until the line fits."""
    line = json.dumps(report).encode() + b"\n"
    while len(line) > MAX_LINE_BYTES:
        key = max((k for k, v in report.items() if isinstance(v, str)), key=lambda k: len(report[k]))
        text = report[key]
        keep = max(0, int(len(text) * 0.8) - 8)
        report = report | {key: text[: keep // 4] + "\n...\n" + text[len(text) - (keep - keep // 4) :]}
        line = json.dumps(report).encode() + b"\n"
    return line


class LineBuffer:
    """Cuts a byte stream into reports; an unfinished line waits for its rest, a damaged one is dropped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add bytes and return the reports that they complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        reports = []
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                reports.append(value)
        return reports
