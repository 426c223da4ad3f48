"""``phalanx logs``: what a rank has printed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from launcher.commands.common import dir_option, find, json_option, print_json, run_argument, say, split

if TYPE_CHECKING:
    from launcher.store import RunStore

SCHEMA_VERSION = 1
POLL_S = 0.5


@click.command(
    "logs",
    short_help="Show what a rank has printed.",
    epilog="Examples: phalanx logs latest -f | phalanx logs latest --rank 3 --attempt 1",
)
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends, across attempts.")
@click.option("--rank", "-r", type=click.IntRange(min=0), default=0, show_default=True, help="Which rank.")
@click.option("--attempt", "-a", type=click.IntRange(min=1), help="Which attempt (default: the newest).")
@json_option
@dir_option
@run_argument
def command(
    follow: bool, rank: int, attempt: int | None, as_json: bool, folder: str | None, words: tuple[str, ...]
) -> None:
    """Show the log of a rank of RUN, from the run directory or from the node that has it.

    With -f, Ctrl-C ends the watching and nothing else.
    """
    from launcher import rank_logs
    from strategies.errors import ConfigError, NotFound

    if follow and as_json:
        raise ConfigError("--json prints one document, so it does not go with -f.")
    ref, parent, _ = split(words, folder)
    store = find(ref, parent)
    run = store.run()
    if follow:
        _follow(store, rank, attempt)
        return
    number = attempt or rank_logs.newest_attempt(run)
    if not number:
        raise NotFound(f"'{store.name}' has started no ranks yet.", hint=f"phalanx status {store.name}")
    if number > len(run.attempts):
        hint = "Leave --attempt out for the last one."
        raise NotFound(f"'{store.name}' has no attempt {number}: there are {len(run.attempts)}.", hint=hint)
    piece = rank_logs.read_all(store.paths, number, rank)
    if piece is None:
        raise rank_logs.missing(store.paths, store.name, number, rank)
    if as_json:
        lines = piece.text.splitlines()
        head = {"schema_version": SCHEMA_VERSION, "run": store.name, "attempt": number, "rank": rank}
        print_json(head | {"source": piece.source, "lines": lines})
    else:
        click.echo(piece.text, nl=not piece.text.endswith("\n"))


def _follow(store: RunStore, rank: int, attempt: int | None) -> None:
    from launcher import rank_logs

    shown, offset = 0, 0
    try:
        while True:
            run = store.run()
            over = run.state.terminal or (attempt is not None and attempt < len(run.attempts))
            number = attempt or rank_logs.newest_attempt(run)
            if number and number != shown:
                say(f"--- {store.name}: attempt {number}, rank {rank} ---")
                shown, offset = number, 0
            while number and (piece := rank_logs.read(store.paths, number, rank, offset)) is not None:
                if piece.begin < offset:
                    say("--- the log has grown too large and was cut: lines may be missing here ---")
                click.echo(piece.text, nl=False)
                offset = piece.next
                if not piece.text:
                    break
            if over:
                say(f"--- {store.name}: {run.state.value} ---")
                return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say("")
