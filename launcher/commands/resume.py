"""``phalanx resume``: show what would change, ask, and go on from the newest checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from launcher.commands.common import complete_run, dir_option, find, json_option, say, split

if TYPE_CHECKING:
    from launcher.resume_plan import ResumePlan


@click.command(
    "resume",
    short_help="Go on with a run that ended early or was orphaned.",
    epilog="Examples: phalanx resume latest | phalanx resume gpt_tiny-2026 cluster.nodes=3 strategy.dp=1 --yes",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and stop.")
@click.option("--moved", is_flag=True, help="The run directory was moved on purpose.")
@click.option("--clock-was-ahead", is_flag=True, help="The clock here is right: the one of the log was ahead.")
@click.option("--detach", "-d", is_flag=True, help="Do not watch (existing clusters only).")
@json_option
@dir_option
@click.argument("words", metavar="RUN [OVERRIDES]...", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_run)
@click.pass_context
def command(
    ctx: click.Context,
    yes: bool,
    dry_run: bool,
    moved: bool,
    clock_was_ahead: bool,
    detach: bool,
    as_json: bool,
    folder: str | None,
    words: tuple[str, ...],
) -> None:
    """Go on with RUN: a failed, cancelled or orphaned one. A live gang without a controller is adopted.

    Shows the difference from the last attempt, every change as safe, changing the run, or refused (exit code 6), and
    asks. The budget of restarts is renewed.
    """
    from launcher import launch, resume_plan
    from launcher.finish import finish
    from launcher.follow import screen

    ref, parent, overrides = split(words, folder, overrides=True)
    store = find(ref, parent)
    planned = resume_plan.prepare(store, overrides, say, moved=moved, clock_was_ahead=clock_was_ahead)
    say(planned.text)
    planned.refuse()
    if dry_run:
        return
    _ask(planned, yes)
    with launch.closing(screen()) as shown:
        wish = resume_plan.propose(store, planned)
        outcome = launch.run(
            store, shown, request=planned.request, resume=wish, adopt=not planned.changes, detach=detach
        )
    ctx.exit(finish(store, planned.config, outcome, as_json=as_json, folder=folder or ""))


def _ask(planned: ResumePlan, yes: bool) -> None:
    """Get a person's consent.

    Raises:
        ConfigError: There is nobody to ask.
    """
    from strategies.errors import ConfigError

    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("There is no terminal to ask on.", hint="Add --yes to go on as shown above.")
    click.confirm("Go on?", abort=True, err=True)
