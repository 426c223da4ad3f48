"""What a short-lived process asks of Ray: ``python -m launcher.ray_backend VERB ...``, so that it can be given up."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from jobs.data.work import perform
from launcher import ray_backend
from launcher.ray_client import as_remote
from launcher.ray_node import VISIT
from launcher.ray_submit import submit
from strategies.errors import ClusterError


def main() -> None:
    """Entry point: ``start ARGS...``, ``describe ADDRESS``, ``submit RUN_DIR ORDER``, ``map ADDRESS CODE``.

    All but the first answer in JSON.
    """
    verb, *rest = sys.argv[1:]
    if verb == "start":
        try:
            ray_backend.start_node(*rest)
        except ClusterError as error:
            sys.exit(" ".join(str(error).split()))
    try:
        if verb == "describe":
            answer: dict[str, Any] = {"nodes": ray_backend.gcs_nodes(rest[0])}
        else:
            # Whoever asked has lost patience: what has been begun must be taken back.
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
        if verb == "map":
            answer = {"answered": spread_work(rest[0], Path(rest[1]))}
        elif verb == "submit":
            answer = submit(Path(rest[0]), rest[1])
    except Exception as error:
        answer = {"error": as_remote(error)}
    print(json.dumps({"phalanx": 1} | answer), flush=True)
    sys.exit("error" in answer)


def spread_work(address: str, code: Path) -> int:
    """Pass requests of :mod:`jobs.data.work` from standard input to a cluster, and its answers to standard output."""
    requests = [json.loads(line) for line in sys.stdin]
    with ray_backend.connected(Path(os.environ[VISIT]), address):
        for index, answer in ray_backend.spread(perform, requests, code):
            print(json.dumps({"index": index, "answer": answer}), flush=True)
    return len(requests)
