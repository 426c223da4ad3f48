"""Work on data spread over the nodes of a running Ray cluster, seen from a process that does not import Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO

from jobs.data.work import Answer, Request, failed
from launcher.ray_client import answer_in, reach
from launcher.ray_errors import auth_environment
from launcher.ray_node import VISIT, visit
from launcher.ray_process import is_answer, let_go, python_path, silent
from launcher.ship import renew_code


class OnRay:
    """Workers on every processor of a cluster; a :class:`jobs.data.work.Runner`.

    Args:
        address: ``IP:PORT`` of the cluster's head.
        root: Folder of token stores, on a file system that every node sees under this path; our code is copied there.
    """

    def __init__(self, address: str, root: Path) -> None:
        self._address = address
        self._code = root / ".code"

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
        """Answer every request, in any order.

        Raises:
            ClusterError: The cluster cannot be reached, or refuses us.
            StorageError: A node could not read or write something.
        """
        reach(self._address)
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as complaint:
            for request in requests:
                asked.write(json.dumps(request).encode() + b"\n")
            asked.seek(0)
            self._code.parent.mkdir(parents=True, exist_ok=True)
            renew_code(self._code)
            yield from self._ask(asked, complaint)

    def _ask(self, asked: IO[bytes], complaint: IO[bytes]) -> Generator[tuple[int, Answer]]:
        command = [sys.executable, "-P", "-m", "launcher.ray_backend", "map", self._address, str(self._code)]
        environment = os.environ | auth_environment() | {"PYTHONPATH": python_path(), "RAY_BACKEND_LOG_LEVEL": "fatal"}
        with visit() as variables:
            process = subprocess.Popen(
                command,
                stdin=asked,
                stdout=subprocess.PIPE,
                stderr=complaint,
                env=environment | variables,
                cwd=variables[VISIT],
                start_new_session=True,
            )
            assert process.stdout is not None
            last = b""
            try:
                for line in process.stdout:
                    if not line.startswith(b'{"index": '):
                        last = line
                        continue
                    told = json.loads(line)
                    if "error" in told["answer"]:
                        raise failed(told["answer"])
                    yield told["index"], told["answer"]
                process.wait()
            finally:
                let_go(process)
        what = f"The cluster at {self._address} could not work on the data."
        if not is_answer(last):
            complaint.seek(0)
            said = complaint.read().decode(errors="replace").strip().splitlines()
            raise silent(what, "".join(said[-1:]))
        answer_in(last.decode(), what=what)
