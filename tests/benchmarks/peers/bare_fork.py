"""The lower bound: a process that has imported everything forks the ranks, and forks them again when one has died.

Nothing is supervised, recorded, fenced or verified here: whatever keeps ranks alive by forking them must do at least
this much, so its time is the time of the ranks themselves.

``python -m tests.benchmarks.peers.bare_fork RUN_DIR RANKS``
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from jobs.warm import warm

MAX_ATTEMPTS = 8


def main() -> int:
    """Fork, wait, and fork again until every rank has ended well."""
    run_dir, ranks = Path(sys.argv[1]), int(sys.argv[2])
    warm()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        with socket.create_server(("127.0.0.1", 0)) as store:
            pids = [_fork(run_dir, rank, ranks, attempt, store) for rank in range(ranks)]
        if _all_well(pids):
            return 0
    return 1


def _fork(run_dir: Path, rank: int, ranks: int, attempt: int, store: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        from tests.benchmarks.peers.loop import environment_of, train

        port = store.getsockname()[1]
        env = environment_of(run_dir, rank=rank, world_size=ranks, attempt=attempt, address="127.0.0.1", port=port)
        train(replace(env, store_fd=store.detach() if rank == 0 else -1))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def _all_well(pids: list[int]) -> bool:
    """Wait for the ranks; the first that fails takes the others with it."""
    left, well = set(pids), True
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status and well:
            well = False
            for other in left:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
    return well


if __name__ == "__main__":
    sys.exit(main())
