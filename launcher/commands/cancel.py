"""``phalanx cancel``: end a run, whoever controls it, even nobody."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from launcher.commands.common import dir_option, find, json_option, print_json, run_argument, say, split

if TYPE_CHECKING:
    from launcher.run import RunState
    from launcher.store import RunStore

WAIT_S = 60.0
POLL_S = 0.2


@click.command(
    "cancel",
    short_help="End a run; it can be resumed later.",
    epilog="Example: phalanx cancel latest",
)
@json_option
@dir_option
@run_argument
def command(as_json: bool, folder: str | None, words: tuple[str, ...]) -> None:
    """End RUN: its ranks get SIGTERM, then SIGKILL after recovery.grace_s; nodes are given back.

    Works when its controller is dead, too. A run that has ended already is left as it is.
    """
    from launcher import orphan, supervise
    from launcher.describe import describe
    from launcher.lock import controlled
    from launcher.run import RunState
    from strategies.errors import ConfigError

    ref, parent, _ = split(words, folder)
    store = find(ref, parent)
    state = store.run().state
    if state.terminal and state is not RunState.CANCELLED:
        raise ConfigError(f"'{store.name}' has ended already: {state.value}.")
    if not state.terminal:
        supervise.request_cancel(store, by="phalanx cancel")
        state = _wait(store) if controlled(store.paths) else orphan.cancel(store)
    say(f"{store.name}: {state.value}")
    if as_json:
        print_json(describe(store, time.time()))


def _wait(store: RunStore) -> RunState:
    """Until the controller has done it; one that dies meanwhile is replaced."""
    from launcher import orphan
    from launcher.lock import controlled
    from strategies.errors import ClusterError

    deadline = time.monotonic() + WAIT_S + store.request().recovery.grace_s
    while time.monotonic() < deadline:
        state = store.run().state
        if state.terminal:
            return state
        if not controlled(store.paths):
            return orphan.cancel(store)
        time.sleep(POLL_S)
    raise ClusterError(
        f"The controller of '{store.name}' lives but has not cancelled it yet.",
        hint=f"It will; look again: phalanx status {store.name}",
    )
