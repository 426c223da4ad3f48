"""Gangs for tests: N ranks forked from one warm process that has imported torch and deepspeed once.

``WarmPool.run("tests.support.ranks:train", world_size=4, arguments={...})`` calls the function in every rank as
``function(env, **arguments)``, with ``env`` a :class:`jobs.spec.RankEnv` of a fresh rendezvous, and returns what the
ranks returned (JSON values), by rank. The warm process runs one thread and nothing but imports, so that forking it is
safe; ranks die with it. It is a process of its own: pytest has threads, and warnings of third parties stay outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from jobs.spec import RankEnv

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
FAILURE_GRACE_S = 1.0  # how long the others may go on after a rank failed, so that its output is complete


class GangFailed(AssertionError):
    """A rank failed or the gang took too long; the message has every rank's output."""


class WarmPool:
    """The warm process, started at the first use; a context manager.

    Args:
        environment: Variables on top of the inherited ones.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WarmPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        target: str,
        *,
        world_size: int,
        arguments: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        run_dir: str = "",
    ) -> list[Any]:
        """Run one gang to its end.

        Args:
            target: ``module:function`` to call in every rank.
            world_size: Number of ranks.
            arguments: Keyword arguments, as JSON values.
            timeout_s: After this many seconds every rank is killed.
            run_dir: Run directory in the ranks' :class:`RankEnv`.

        Raises:
            GangFailed: A rank raised, died or took too long.
        """
        request = {
            "target": target,
            "world_size": world_size,
            "arguments": dict(arguments or {}),
            "timeout_s": timeout_s,
            "run_dir": run_dir,
        }
        answer = self._ask(request)
        if answer["failure"]:
            raise GangFailed(f"{target}: {answer['failure']}\n{answer['output']}")
        return list(answer["results"])

    def close(self) -> None:
        """End the warm process; its ranks, if any, die with it."""
        if self._process is not None:
            process, self._process = self._process, None
            with process:
                process.kill()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self.close()
            raise GangFailed(f"the warm process died, asked for {request['target']}")
        return dict(json.loads(line))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            accelerator = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.gang"],
                cwd=ROOT,
                env={**os.environ, **one_thread, **accelerator, **self._environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._process


class _Rank:
    """One forked rank, as its parent sees it."""

    def __init__(self, rank: int, run: Callable[[], Any]) -> None:
        self.rank = rank
        self.output, theirs = os.pipe()
        self.result = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the process's end
        self.code: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank(theirs, self.result, run)
        os.close(theirs)
        self.pidfd = os.pidfd_open(self.pid)

    def answer(self) -> Any:
        """What the rank's function returned."""
        self.result.seek(0)
        return json.load(self.result)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.code is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Free the descriptors."""
        os.close(self.output)
        os.close(self.pidfd)
        self.result.close()


def _become_rank(output: int, result: IO[bytes], run: Callable[[], Any]) -> None:
    """Never returns: runs the function in the forked child and ends it without the parent's exit handlers."""
    code = 1
    try:
        _die_with_parent()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        result.write(json.dumps(run()).encode())
        result.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _serve() -> None:
    """Main loop of the warm process: one request per line on stdin, one answer per line on the real stdout."""
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what imports print must not look like an answer
    importlib.import_module("jobs.engine")
    importlib.import_module("tests.support.half").compute_half_on_any_cpu()
    for number in itertools.count(1):
        line = sys.stdin.buffer.readline()
        if not line:
            return
        answers.write(json.dumps(_run_gang(json.loads(line), number)).encode() + b"\n")
        answers.flush()


def _run_gang(request: dict[str, Any], number: int) -> dict[str, Any]:
    tasks = os.listdir("/proc/self/task")
    assert len(tasks) == 1, f"the warm process has {len(tasks)} threads, forking is not safe"
    module, _, name = request["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    with socket.create_server(("127.0.0.1", 0)) as store:
        ranks = [
            _Rank(rank, _call(function, _env_of(rank, request, number, store), request["arguments"]))
            for rank in range(request["world_size"])
        ]
    output, failure = _watch(ranks, time.monotonic() + request["timeout_s"])
    results = [] if failure else [rank.answer() for rank in ranks]
    for rank in ranks:
        rank.close()
    return {"results": results, "failure": failure, "output": output}


def _env_of(rank: int, request: dict[str, Any], number: int, store: socket.socket) -> RankEnv:
    size = request["world_size"]
    return RankEnv(
        rank=rank,
        local_rank=rank,
        world_size=size,
        local_world_size=size,
        node_rank=0,
        master_addr="127.0.0.1",
        master_port=store.getsockname()[1],
        run_id="test",
        run_dir=request["run_dir"],
        epoch=1,
        attempt=number,
        store_fd=os.dup(store.fileno()) if rank == 0 else -1,
    )


def _call(function: Callable[..., Any], env: RankEnv, arguments: dict[str, Any]) -> Callable[[], Any]:
    def run() -> Any:
        os.environ.update(env.variables())
        return function(env, **arguments)

    return run


def _watch(ranks: list[_Rank], deadline: float) -> tuple[str, str]:
    """Follow the ranks until all have ended; returns their output and, if something went wrong, what."""
    lines: list[str] = []
    rest = {rank.rank: b"" for rank in ranks}
    failure = ""
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            selector.register(rank.output, selectors.EVENT_READ, (rank, "output"))
            selector.register(rank.pidfd, selectors.EVENT_READ, (rank, "exit"))
        while any(rank.code is None for rank in ranks):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                failure = failure or "timed out"
                for rank in ranks:
                    rank.kill()
                deadline = time.monotonic() + 60  # SIGKILL takes effect before that
            for key, _ in ready:
                rank, what = key.data
                if what == "output":
                    data = os.read(rank.output, 65536)
                    *whole, rest[rank.rank] = (rest[rank.rank] + data).split(b"\n")
                    lines += [f"[rank {rank.rank}] {line.decode(errors='replace')}" for line in whole]
                    if not data:
                        selector.unregister(rank.output)
                    continue
                selector.unregister(rank.pidfd)
                rank.code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
                if rank.code != 0 and not failure:
                    failure = f"rank {rank.rank} ended with {rank.code}"
                    deadline = min(deadline, time.monotonic() + FAILURE_GRACE_S)
    for rank in ranks:
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(rank.output, False)
            rest[rank.rank] += os.read(rank.output, 1 << 20)
        lines += [f"[rank {rank.rank}] {line}" for line in rest[rank.rank].decode(errors="replace").splitlines()]
    return "\n".join(lines), failure


if __name__ == "__main__":
    _serve()
