"""The controller of one rehearsal as a process of its own, which may be killed: ``-m launcher.drill.controlled DIR``.

It does what ``phalanx submit`` does after the run directory is there; what it shows goes to ``drill.log``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launcher import launch
from launcher.follow import Screen
from launcher.run import RunState
from launcher.store import RunStore
from strategies.errors import PhalanxError, RunCancelled, RunFailed


def main(folder: str) -> int:
    """Run until the end; returns an exit code of the error tree."""
    screen = Screen(sys.stderr)
    try:
        state = launch.run(RunStore.open(Path(folder)), screen).state
    except PhalanxError as error:
        screen.say(f"error: {error}")
        return error.exit_code
    codes = {RunState.SUCCEEDED: 0, RunState.CANCELLED: RunCancelled.exit_code}
    return codes.get(state, RunFailed.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
