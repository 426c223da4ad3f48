"""An object store of one's own: a real S3-compatible server on loopback, started and ended by the test.

As a program (``python -P objectstore.py PORT``) it is that server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "phalanx-test"
SECRET = "a-secret-that-must-not-be-seen"
_START_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectStore:
    """A running server.

    Attributes:
        endpoint: Its address.
        pid: Its process.
    """

    endpoint: str
    pid: int

    @property
    def environment(self) -> Mapping[str, str]:
        """What leads every client there, with credentials."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "phalanx",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @contextlib.contextmanager
    def stuck(self) -> Iterator[None]:
        """Meanwhile it takes connections and says nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def object_store(log: Path) -> Iterator[ObjectStore]:
    """Start a server with an empty bucket; this process reaches it while the context lasts."""
    pytest.importorskip("moto")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-P", __file__, str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    store = ObjectStore(endpoint=f"http://127.0.0.1:{port}", pid=process.pid)
    try:
        _await(process, port, log)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in store.environment.items():
                patch.setenv(name, value)
            client().mkdir(BUCKET)
            yield store
    finally:
        process.kill()
        process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"the object store has not started within {_START_S} s:\n{log.read_text()}")


def client() -> Any:
    """A client of its own, as another program would have one; forgets those that know another server."""
    import fsspec

    from jobs.checkpoint.storage import bounded

    kind = fsspec.get_filesystem_class("s3")
    for known in (kind, bounded(kind)):
        known.clear_instance_cache()
    return kind(use_listings_cache=False, skip_instance_cache=True)


def serve(port: int) -> None:
    """Be moto's server, but for one thing: it looks whether an object exists and creates it in two steps, in as many
    threads as there are requests. A store carries a conditional PUT out at once, so here one request follows another.
    """
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    application, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_by_one(environ: Any, start_response: Any) -> Any:
        with turn:
            return application(environ, start_response)

    os.environ["MOTO_PORT"] = str(port)
    run_simple("127.0.0.1", port, one_by_one, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
