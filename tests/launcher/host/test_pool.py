"""The pool's process itself, without an agent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

UNSAFE_LATER = """
from launcher.host import pool

answers = iter(["", "it has become unsafe"])
pool.unsafe_to_fork = lambda: next(answers)
pool.main()
"""


def test_whether_a_fork_is_safe_is_asked_before_each(tmp_path: Path) -> None:
    """A pool that was safe when its first rank was forked, and is not any more when the second one is due."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(60.0)
    command = [sys.executable, "-c", UNSAFE_LATER, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
    command += ["--warm", "tests.support.fakejob:warm", "--target", "tests.support.fakejob:warm"]
    root = str(Path(__file__).parents[3])
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=root, start_new_session=True) as pool:
        try:
            assert json.loads(ours.recv(65536)) == {"op": "ready", "reason": ""}
            fresh = [started(ours, key, root, tmp_path / key) for key in ("first", "second")]
            assert fresh == ["", "it has become unsafe"]
            ours.shutdown(socket.SHUT_RDWR)
            assert pool.wait(20.0) == 0
        finally:
            pool.kill()


def started(pool: socket.socket, key: str, folder: str, log: Path) -> str:
    """Have a rank started and wait for its good end; returns why it was not forked."""
    order: dict[str, Any] = {"op": "spawn", "key": key, "name": key, "cwd": folder, "argv": None, "fds": ["log"]}
    with log.open("wb") as file:
        socket.send_fds(pool, [json.dumps(order | {"env": {"PYTHONPATH": folder}}).encode()], [file.fileno()])
    said, ended = (json.loads(pool.recv(65536)) for _ in range(2))
    assert (said["op"], said["key"]) == ("spawned", key)
    assert (ended["op"], ended["pid"], ended["code"]) == ("exit", said["pid"], 0), log.read_text()
    return str(said["fresh"])
