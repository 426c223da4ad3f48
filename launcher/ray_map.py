"""Work on data spread over the nodes of a running Ray cluster, seen from a process that does not import Ray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import IO

from jobs.data.build import aside_in, remove_abandoned
from jobs.data.work import Answer, Request, failed
from jobs.folders import made_for
from launcher.ray_client import answer_in, reach
from launcher.ray_errors import auth_environment
from launcher.ray_node import VISIT, visit
from launcher.ray_process import is_answer, let_go, python_path, silent
from launcher.ship import ship_code
from strategies.errors import StorageError


class OnRay:
    """Workers on every processor of a cluster; a :class:`jobs.data.work.Runner`.

    Args:
        address: ``IP:PORT`` of the cluster's head.
        root: Folder of token stores, on a file system that every node sees under this path; our code lies there for
            as long as the nodes work, and a folder that was made for it goes with it.
    """

    def __init__(self, address: str, root: Path) -> None:
        self._address = address
        self._root = root

    def __call__(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer]]:
        """Answer every request, in any order.

        Raises:
            ClusterError: The cluster cannot be reached, or refuses us.
            StorageError: A node could not read or write something.
        """
        reach(self._address)
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as complaint, code_in(self._root) as code:
            for request in requests:
                asked.write(json.dumps(request).encode() + b"\n")
            asked.seek(0)
            yield from self._ask(asked, complaint, code)

    def _ask(self, asked: IO[bytes], complaint: IO[bytes], code: Path) -> Generator[tuple[int, Answer]]:
        command = [sys.executable, "-P", "-m", "launcher.ray_backend", "map", self._address, str(code)]
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


@contextlib.contextmanager
def code_in(root: Path) -> Iterator[Path]:
    """A copy of our packages where every node sees it; nothing of it is left, whatever is found wrong with the data.

    Raises:
        StorageError: It cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(made_for(root))
            remove_abandoned(root)
            aside = stack.enter_context(aside_in(root))
            aside.chmod(0o755)  # workers may be another user's
        except OSError as error:
            why, hint = error.strerror or str(error), "Choose another data.cache=DIR, or mend it."
            raise StorageError(f"Nothing can be written to {root}.", why=why, hint=hint) from error
        ship_code(aside / "code")
        yield aside / "code"
