"""``phalanx submit``: plan, prepare, run, and watch until the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.commands.common import interruptible, json_option, overrides_argument, print_json, say

if TYPE_CHECKING:
    from launcher.drill.toy import Toy
    from launcher.follow import Screen
    from launcher.ray_process import RayProcess
    from launcher.request import LaunchRequest
    from launcher.ship import Shipment

SCHEMA_VERSION = 1


@click.command(
    "submit",
    short_help="Run it, and watch.",
    epilog="""
    \b
    Examples:
    phalanx submit experiment=quickstart
    phalanx submit experiment=gpt3_175b --rehearse
    phalanx submit job=script job.command='python train.py --lr 1e-3'
    """,
)
@click.option("--dry-run", is_flag=True, help="Print exactly what would be sent, and start nothing.")
@click.option("--detach", "-d", is_flag=True, help="Do not watch (existing clusters only: the run goes on there).")
@click.option("--rehearse", is_flag=True, help="Run it in miniature on this machine, through a fault, to the end.")
@json_option
@overrides_argument
@click.pass_context
def command(
    ctx: click.Context, dry_run: bool, detach: bool, rehearse: bool, as_json: bool, overrides: tuple[str, ...]
) -> None:
    """Plan, prepare the data, start, and watch a run until it ends.

    OVERRIDES are those of plan. Exit code: 0 succeeded (or detached), 100 failed, 103 cancelled. Ctrl-C cancels a run
    on this machine cleanly, and detaches from one on an existing cluster.

    --rehearse submits the same plan with smaller sizes, at most eight ranks on a Ray cluster of two nodes and a spare
    on this machine, and shows the difference first. A node is killed on the way, or what faults=[...] says; it fails
    (100) unless every fault fired and was noticed, the run ended, and no more was lost than its copies in memory allow.
    """
    from launcher import backends

    with backends.asking(overrides) as ray:
        ctx.exit(_submit(overrides, ray, dry_run=dry_run, detach=detach, rehearse=rehearse, as_json=as_json))


def _submit(
    overrides: tuple[str, ...], ray: RayProcess | None, *, dry_run: bool, detach: bool, rehearse: bool, as_json: bool
) -> int:
    """Everything; returns the exit code."""
    from launcher import launch
    from launcher.backends import dealt
    from launcher.cautions import cautions, crowding
    from launcher.finish import finish
    from launcher.follow import screen
    from launcher.preparation import prepare_data
    from launcher.submission import submission

    submitted = submission(overrides, ray, rehearse=rehearse, detach=detach)
    config, request, toy = submitted.config, submitted.request, submitted.toy
    with interruptible(), launch.closing(screen()) as shown:
        crowded = crowding(request, len(os.sched_getaffinity(0)), devices=bool(dealt(request).shares))
        for text in (*cautions(config, request.job.model), *crowded):
            shown.say(f"warning: {text}")
        if toy:
            _announce(toy, request, shown)
        request = prepare_data(config, request, shown)
        if dry_run:
            print_json(dry_run_document(request, submitted.shipment))
            return 0
        store = launch.create(request, config, submitted.shipment)
        shown.say(f"run {store.name} in {store.paths.root}")
        outcome = launch.run(store, shown, detach=detach, ray=ray)
    folder = _typed_folder(config.run.dir)
    return finish(store, config, outcome, as_json=as_json, folder=folder, rehearsal=toy)


def _announce(toy: Toy, request: LaunchRequest, shown: Screen) -> None:
    """Show what is smaller, and write the text that the rehearsal learns."""
    from launcher.drill.miniature import announcement
    from launcher.drill.programme import corpus

    shown.say(announcement(toy, request.job.faults))
    corpus(Path(request.job.data.path).parent)


def dry_run_document(request: LaunchRequest, shipment: Shipment | None) -> dict[str, Any]:
    """What submit would send: the request verbatim, its digest, and the files of a script's project."""
    from strategies.codec import to_json

    files = None
    if shipment is not None:
        files = {
            "root": str(shipment.root),
            "files": [str(file) for file in shipment.files],
            "bytes": shipment.bytes,
            "largest": [{"name": name, "bytes": size} for name, size in shipment.largest],
        }
        say(f"would ship {len(shipment.files)} files, {shipment.bytes / 1e6:.1f} MB, of {shipment.root}")
    return {"schema_version": SCHEMA_VERSION, "request": to_json(request), "digest": request.digest, "ship": files}


def _typed_folder(folder: str) -> str:
    """The parent folder as a person would type it: nothing for the default one."""
    return "" if Path(folder) == Path.cwd() / "runs" else folder
