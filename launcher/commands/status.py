"""``phalanx status``: what the run directories say, whether or not a cluster is still there."""

from __future__ import annotations

import time

import click

from launcher.commands.common import dir_option, find, json_option, print_json, run_argument, say, split

SCHEMA_VERSION = 1


@click.command(
    "status",
    short_help="Show all runs, or one run in full.",
    epilog="Examples: phalanx status | phalanx status latest | phalanx status gpt_tiny-2026 --json",
)
@json_option
@dir_option
@run_argument
def command(as_json: bool, folder: str | None, words: tuple[str, ...]) -> None:
    """Show all runs, or everything about RUN (a name, a unique prefix, or 'latest').

    Reads the run directory only: it works when the cluster is gone, and never disturbs a run.
    """
    from launcher import render
    from launcher.describe import brief, describe
    from launcher.store import RunStore
    from strategies.errors import NotFound

    ref, parent, _ = split(words, folder)
    if ref is not None:
        document = describe(find(ref, parent), time.time())
        if as_json:
            print_json(document)
        else:
            click.echo(render.run_text(document))
        return
    if not parent.exists() and folder is not None:
        raise NotFound(f"There is no folder {parent.absolute()}.", hint="--dir names the parent folder of runs.")
    rows = [brief(RunStore(parent.absolute() / name)) for name in RunStore.names(parent)]
    rows.sort(key=lambda row: float(row.get("submitted") or 0.0))
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "dir": str(parent.absolute()), "runs": rows})
    elif rows:
        click.echo(render.runs_table(rows))
    else:
        say(f"There are no runs in {parent.absolute()}. phalanx submit experiment=quickstart makes one.")
