"""A process that talks to Ray for a client that does not import it. It can be given up when a cluster does not answer.

Inside a process Ray waits for half a minute or longer, prints what it thinks of that, and keeps the signal handlers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import launcher
from launcher.ray_errors import auth_environment
from launcher.ray_node import VISIT, visit
from strategies.errors import ClusterError

LET_GO_S = 12.0  # for a process that is asked to end: it may have to withdraw an actor and a node


class RayProcess:
    """Answers one question after the other; a context manager at whose end nothing of it is left.

    It starts with the first question, or before it with :meth:`start`: importing Ray takes about a second, in which its
    client can do something else.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._running = contextlib.ExitStack()
        self._log = Path()
        self._rest = b""

    def __enter__(self) -> RayProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Begin to import Ray; returns at once."""
        with contextlib.ExitStack() as stack:
            variables = stack.enter_context(visit())
            self._log, self._rest = Path(variables[VISIT]) / "log", b""
            own = {"PYTHONPATH": python_path(), "RAY_BACKEND_LOG_LEVEL": "fatal"}
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "launcher.ray_backend", "serve"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=os.environ | auth_environment() | own | variables,
                    cwd=variables[VISIT],
                    start_new_session=True,
                )
            stack.callback(let_go, self._process)
            self._running = stack.pop_all()

    def ask(self, arguments: list[str], timeout_s: float, *, what: str) -> str:
        """What the process says about a question, its answer last; one that does not answer is given up.

        Args:
            arguments: A verb of :mod:`launcher.ray_verbs`, and what it needs.
            timeout_s: How long the answer may take.
            what: What an error says first.

        Raises:
            ClusterError: There is no answer, in time or at all.
        """
        if self._process is None:
            self.start()
        try:
            return self._answer(arguments, timeout_s, what)
        except BaseException:
            self.close()
            raise

    def _answer(self, arguments: list[str], timeout_s: float, what: str) -> str:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then its output ends, and its log says why
            self._process.stdin.write(json.dumps(arguments).encode() + b"\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + timeout_s
        while True:
            line, end, rest = self._rest.partition(b"\n")
            if end:
                self._rest = rest
                if is_answer(line):
                    return line.decode()
            elif not _has_news(self._process.stdout.fileno(), deadline - time.monotonic()):
                raise ClusterError(
                    what,
                    why=f"a port is open there, but no Ray head answered within {timeout_s:.0f} s",
                    hint="Check that cluster.address is the head's IP:PORT (6379 by default), not a port of another "
                    "kind.",
                )
            elif data := os.read(self._process.stdout.fileno(), 1 << 16):
                self._rest += data
            else:
                said = [one for one in self._log.read_text(errors="replace").splitlines() if one.strip()]
                raise silent(what, "".join(said[-1:]))

    def close(self) -> None:
        """End it, and what it has started on this machine."""
        self._process = None
        self._running.close()


def _has_news(fd: int, timeout_s: float) -> bool:
    # Not select(), which takes no descriptor above 1023: a controller of thousands of nodes has as many connections.
    watched = select.poll()
    watched.register(fd, select.POLLIN)
    return bool(watched.poll(max(0.0, timeout_s) * 1000))


def let_go(asked: subprocess.Popen[bytes]) -> None:
    """End a process: it may take back what it has begun, but not take long."""
    try:
        if asked.poll() is None:
            asked.terminate()
            asked.wait(timeout=LET_GO_S)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also when the user presses Ctrl-C once more
        if asked.poll() is None:
            os.killpg(asked.pid, signal.SIGKILL)
            asked.wait()
        for pipe in (asked.stdin, asked.stdout):  # what it has started may hold the other ends
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def is_answer(line: str | bytes) -> bool:
    """Whether a line is an answer of :mod:`launcher.ray_verbs`, not something that Ray has printed."""
    with contextlib.suppress(ValueError):
        answer: Any = json.loads(line)
        return isinstance(answer, dict) and "phalanx" in answer
    return False


def silent(what: str, why: str) -> ClusterError:
    """The error of a process that has ended without an answer."""
    return ClusterError(what, why=why.strip(), hint="Check that the cluster runs the same Ray and Python versions.")


def python_path() -> str:
    """Our packages, before whatever the user has."""
    root = str(Path(str(launcher.__file__)).resolve().parents[1])
    kept = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", root)]
    return os.pathsep.join([root, *kept])
