"""The end of a followed run: the summary on stdout, the verdict as an exit code."""

from __future__ import annotations

import json
import time

import click

from launcher import progress, render
from launcher.describe import describe
from launcher.drill import miniature
from launcher.drill.toy import Toy
from launcher.launch import Outcome
from launcher.proof import unproven
from launcher.run import RunState
from launcher.schema import Config
from launcher.store import RunStore
from strategies.errors import PhalanxError, RunCancelled, RunFailed


def finish(
    store: RunStore, config: Config, outcome: Outcome, *, as_json: bool, folder: str, rehearsal: Toy | None = None
) -> int:
    """Sum up and return the exit code.

    Args:
        store: The run.
        config: Its configuration.
        outcome: How following it ended.
        as_json: Print the status document instead of a text.
        folder: Parent folder of runs as a person would type it; "" for the default.
        rehearsal: What was run, if it was an experiment in miniature.
    """
    document = describe(store, time.time(), watch_s=0.0)
    verdict = judge(store, config, outcome)
    if rehearsal is not None:
        verdict = verdict or miniature.judge(rehearsal, document)
        document["rehearsal"] = miniature.document(rehearsal, store.request().job.faults, document, verdict)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    elif outcome.detached:
        click.echo(f"{store.name} goes on without us.\n\n{render.indent(render.commands(document, folder))}")
    else:
        click.echo(render.summary(document, folder=folder))
        if rehearsal is not None:
            click.echo("\n" + miniature.verdict_text(document["rehearsal"], document))
    if verdict is None:
        return 0
    click.echo(f"error: {verdict}", err=True)
    return verdict.exit_code


def judge(store: RunStore, config: Config, outcome: Outcome) -> PhalanxError | None:
    """What is wrong with the end of a run, if anything."""
    if outcome.detached:
        return None
    run = store.run()
    if outcome.state is RunState.CANCELLED:
        return RunCancelled(f"'{store.name}' was cancelled.", hint=f"phalanx resume {store.name} goes on with it.")
    if outcome.state is not RunState.SUCCEEDED:
        return RunFailed(
            f"'{store.name}' failed.",
            why=run.reason,
            hint=f"phalanx logs {store.name} shows the ranks' output; phalanx resume {store.name} goes on.",
        )
    missing = unproven(store.request().job.faults, store.events(), progress.fault_records(store.paths))
    if config.experiment.require_faults and missing:
        return RunFailed(
            f"'{store.name}' finished, but the record does not show that these faults happened: {', '.join(missing)}.",
            why="experiment.require_faults demands that every injected fault fired and was noticed",
            hint=f"See {store.paths.faults} and {store.paths.events}.",
        )
    return None
