"""A keeper whose nodes are not Ray: main module of the keeper process in fast tests of the embedded cluster.

A fake node has a child in a session of its own and with an empty environment, as Ray's helpers seem to have.
``FAKE_NODES`` in the environment: ``slow`` nodes never become ready, ``broken`` ones end at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher import keeper

_NODE = """
import os, socket, subprocess, sys, time
address, mode = sys.argv[1:]
if mode == "broken": sys.exit("no such luck")
child = subprocess.Popen(["sleep", "600", f"0.000{os.getppid()}"], env={}, start_new_session=True)
if address:
    host, port = address.split(":")
    server = socket.create_server((host, int(port)))
if mode != "slow": print("Ray runtime started", flush=True)
time.sleep(600)
"""


class FakeKeeper(keeper.Keeper):
    """Starts fake nodes."""

    def _command(self, index: int | str, slots: int) -> list[str]:
        mode = "" if index == keeper.HEAD else os.environ.get("FAKE_NODES", "")
        return [sys.executable, "-S", "-c", _NODE, self._address if index == keeper.HEAD else "", mode]


if __name__ == "__main__":
    keeper.ABANDONED_S = 0.5
    sys.exit(FakeKeeper(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])).run())
