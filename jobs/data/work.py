"""What workers do when a mixture is prepared, and processes on this machine that do it.

A request and its answer are JSON, so that it does not matter where a worker is: a process here reads requests from its
standard input, one per line (:func:`main`), and a Ray task calls :func:`perform`. Every worker runs one
thread; as many run as there are processors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jobs.data.documents import Findings, Part, Piece, read_part
from jobs.data.shards import Shard, is_whole, make_shard
from jobs.data.sources import Unit
from jobs.data.spelling import Plain
from strategies.codec import from_json, to_json
from strategies.errors import PhalanxError, StorageError

Request = Mapping[str, Any]
Answer = dict[str, Any]


class Runner(Protocol):
    """Where units are worked on."""

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
        """Answer every request, in any order, as (its index, the answer).

        Raises:
            StorageError: A worker could not read or write something.
        """


def perform(request: Request) -> Answer:
    """Do what is asked for: ``survey`` or ``tokenize`` a unit, ``check`` a shard. An error is an answer with ``error``.

    ``worker`` in the answer is the id of the process.
    """
    return _perform(request) | {"worker": os.getpid()}


def _perform(request: Request) -> Answer:
    try:
        if request["verb"] == "check":
            good = is_whole(from_json(Shard, request["shard"]), Path(request["folder"]), request["number"])
            return {"shard": request["shard"] if good else None}
        unit = from_json(Unit, request["unit"])
        if request["verb"] == "survey":
            return {"parts": [survey(unit, part) for part in unit.parts]}
        shard = make_shard(
            unit,
            Path(request["folder"]),
            request["number"],
            tokenizer=_tokenizer(request["tokenizer"]),
            end_id=request["end_id"],
            width=request["width"],
            validation=request["validation"],
        )
        return {"shard": to_json(shard)}
    except (OSError, PhalanxError) as error:
        return {"error": str(error) or type(error).__name__}


def survey(unit: Unit, part: Part) -> Answer:
    """Read a part as it will be read: its digest, how much is in it, and what is wrong with it."""
    digest, documents, text_bytes = hashlib.sha256(), 0, 0
    found, damage = Findings(), ""
    try:
        for piece in read_part(unit.kind, unit.field, part, found):
            data = piece.text.encode()
            digest.update(f"{len(data)}:{piece.last:d}:".encode() + data)
            text_bytes += len(data)
            documents += piece.last
    except StorageError as error:  # told with all else that is wrong, so that no file has to wait for another
        damage = error.what
    return {
        "digest": digest.hexdigest(),
        "documents": documents,
        "text_bytes": text_bytes,
        "lines": found.lines,
        "empty": found.empty,
        "bad": found.bad,
        "problems": found.problems,
        "binary": found.binary,
        "damage": damage,
    }


def texts(unit: Unit) -> Iterator[Piece]:
    """Every piece of a unit."""
    for part in unit.parts:
        yield from read_part(unit.kind, unit.field, part, Findings())


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Plain:
    from jobs.data.tokenizer import read_tokenizer

    return Plain(read_tokenizer(Path(path)))


class Processes:
    """Workers on this machine.

    Args:
        count: How many; 0 means one per processor that this process may use.
    """

    def __init__(self, count: int = 0) -> None:
        self._count = count or len(os.sched_getaffinity(0))

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
        """See :class:`Runner`."""
        todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
        workers = [_Worker() for _ in range(min(self._count, len(requests)))]
        for index in range(len(requests)):
            todo.put(index)
        threads = [threading.Thread(target=one.serve, args=(requests, todo, done), daemon=True) for one in workers]
        try:
            for thread in threads:
                todo.put(None)
                thread.start()
            for _ in requests:
                index, answer = done.get()
                if "error" in answer:
                    raise failed(answer)
                yield index, answer
        finally:
            for worker in workers:
                worker.stop()
            for thread in threads:
                thread.join()


def answers(
    runner: Runner,
    requests: Sequence[Request],
    sizes: Sequence[int],
    phase: str,
    progress: Callable[[str, float], None],
) -> list[Answer]:
    """The answers in the order of the requests.

    Args:
        runner: Who answers.
        requests: What to do.
        sizes: About how much that is, each.
        phase: What it is called.
        progress: Told the phase and which part of it is done.
    """
    found: dict[int, Answer] = {}
    total, done = max(1, sum(sizes)), 0
    progress(phase, 0.0)
    if requests:
        with contextlib.closing(runner(requests)) as stream:
            for index, answer in stream:
                found[index] = answer
                done += sizes[index]
                progress(phase, done / total)
    return [found[index] for index in range(len(requests))]


def failed(answer: Answer) -> StorageError:
    """The error for a unit that could not be worked on."""
    return StorageError(
        "The data cannot be prepared.",
        why=str(answer["error"]),
        hint="Mend that and submit again: shards that are finished are kept.",
    )


class _Worker:
    """One process. It ends when its standard input does, so that it outlives who started it by a unit at most."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from jobs.data.work import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        )

    def serve(
        self,
        requests: Sequence[Request],
        todo: queue.SimpleQueue[int | None],
        done: queue.SimpleQueue[tuple[int, Answer]],
    ) -> None:
        """Pass requests on until there are no more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        while (index := todo.get()) is not None:
            try:
                self._process.stdin.write(json.dumps(requests[index]).encode() + b"\n")
                self._process.stdin.flush()
                done.put((index, json.loads(self._process.stdout.readline())))
            except (OSError, ValueError):
                done.put((index, {"error": f"a worker ended with {self._process.wait()}"}))
                return

    def stop(self) -> None:
        """End it; what it is at is lost."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # its other end is gone
                    pipe.close()
        self._process.wait()


def main() -> None:
    """A worker process. Ctrl-C reaches it, too, but it is for who started it to end it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(perform(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()
