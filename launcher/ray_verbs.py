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
    """Entry point: ``start ARGS...``; ``submit RUN_DIR ORDER``; ``map ADDRESS CODE``; ``serve`` for any questions.

    A question is a line of standard input, the JSON list of a verb and its arguments; an answer is a line of JSON.
    """
    verb, *rest = sys.argv[1:]
    if verb == "serve":
        for line in sys.stdin:
            _answer(*json.loads(line))
    elif verb == "start":
        try:
            ray_backend.start_node(*rest)
        except ClusterError as error:
            sys.exit(" ".join(str(error).split()))
    else:
        sys.exit(not _answer(verb, *rest))


def _answer(verb: str, *arguments: str) -> bool:
    """Answer a question; whether all was well."""
    try:
        if verb == "describe":
            answer: dict[str, Any] = {"nodes": ray_backend.gcs_nodes(arguments[0])}
        else:
            # Whoever asked has lost patience: what has been begun must be taken back.
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
            answer = _spread(*arguments) if verb == "map" else submit(Path(arguments[0]), arguments[1])
    except Exception as error:
        answer = {"error": as_remote(error)}
    print(json.dumps({"phalanx": 1} | answer), flush=True)
    return "error" not in answer


def _spread(address: str, code: str) -> dict[str, Any]:
    """Pass requests of :mod:`jobs.data.work` from standard input to a cluster, and its answers to standard output."""
    requests = [json.loads(line) for line in sys.stdin]
    with ray_backend.connected(Path(os.environ[VISIT]), address):
        for index, answer in ray_backend.spread(perform, requests, Path(code)):
            print(json.dumps({"index": index, "answer": answer}), flush=True)
    return {"answered": len(requests)}
