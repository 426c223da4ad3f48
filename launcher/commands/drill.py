"""``phalanx drill``: break a small copy of a run on purpose, before real money is spent."""

from __future__ import annotations

import datetime
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.common import interruptible, json_option, overrides_argument, print_json, say

if TYPE_CHECKING:
    from launcher.drill.toy import Toy


@click.command(
    "drill",
    short_help="Rehearse a run and its failures, small, on this machine.",
    epilog="Examples: phalanx drill experiment=gpt3_175b | phalanx drill strategy.tp=2 --faults rank_sigkill,node_kill "
    "| phalanx drill --faults random --seed 7 --count 20 | phalanx drill --faults list",
)
@click.option("--faults", default="all", show_default=True, metavar="NAMES", help="list, all, random, or NAME,NAME,...")
@click.option("--seed", default=0, show_default=True, help="Draws the random faults.")
@click.option("--count", default=10, show_default=True, help="How many random faults.", type=click.IntRange(min=1))
@json_option
@overrides_argument
@click.pass_context
def command(ctx: click.Context, faults: str, seed: int, count: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """Rehearse a run at toy width, with the same kinds of parallelism, and break it on purpose.

    OVERRIDES are those of plan. Every fault is injected into a run of its own and compared with the undisturbed run.
    Random faults are drawn from all that can be rehearsed on this machine, but for controller_kill_start, whose place
    is always the same, and ray_head_kill, which takes minutes.
    Exit code: 0 every fault fired and every run ended as it must, 104 one did not, 105 some faults cannot be rehearsed
    on this machine and the others passed. Ctrl-C ends everything that was started.
    """
    from launcher import launch
    from launcher.drill import report
    from launcher.drill.changes import changes_text
    from launcher.drill.programme import Programme, choose, keeper
    from launcher.follow import screen

    if faults == "list":
        _list(as_json)
        return
    toy = _toy(overrides, faults)
    chosen = choose(faults, toy, seed=seed, count=count)
    toy = _placed(toy)  # writes: nothing is refused after it
    folder = Path(toy.config.run.dir)
    drawn = seed if faults == "random" else None
    with interruptible(), launch.closing(screen()) as shown:
        shown.say(f"drill of {toy.plan.describe()} in {folder}\n{changes_text(toy.changes)}")
        results = Programme(toy, chosen, shown).carry_out(keeper(toy, seed=drawn))
    if as_json:
        plan = toy.plan.describe()
        print_json(report.document(results, folder=str(folder), plan=plan, changes=toy.changes, seed=drawn))
    else:
        click.echo(report.render(results))
    verdict = report.verdict(results, folder)
    if verdict is not None:
        say(f"error: {verdict}")
        ctx.exit(verdict.exit_code)


def _toy(overrides: tuple[str, ...], faults: str) -> Toy:
    """What is rehearsed.

    Raises:
        PhalanxError: Something is wrong with it, with its place or with the names of the faults; all is told.
    """
    from launcher import launch
    from launcher.drill.programme import known_cases
    from launcher.drill.toy import shrink
    from launcher.examination import examined
    from launcher.findings import Findings
    from launcher.host.accelerator import devices

    findings = Findings()
    config = findings.of(lambda: examined(overrides))
    toy = findings.of(lambda: shrink(config, found=devices(os.environ))) if config is not None else None
    if config is not None:
        folder = Path(config.run.dir).absolute()
        findings.of(lambda: launch.check_parent(folder))
    findings.of(lambda: known_cases(faults))
    findings.refuse()
    assert toy is not None, "nothing is wrong"
    return toy


def _placed(toy: Toy) -> Toy:
    """The rehearsal in a new folder, with a text of its own.

    Raises:
        StorageError: The folder cannot be made.
    """
    from launcher.drill.programme import corpus

    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    parent = Path(toy.config.run.dir).absolute()
    folder = parent / f"drill-{stamp}-{secrets.token_hex(2)}"
    text, cache = corpus(folder), str(folder / ".data")
    config = toy.config
    data = replace(config.data, kind="text", path=str(text), cache=cache)
    return replace(toy, config=replace(config, run=replace(config.run, dir=str(folder), name=None), data=data))


def _list(as_json: bool) -> None:
    from launcher.drill.catalogue import CATALOGUE
    from launcher.drill.report import catalogue_document, catalogue_text

    if as_json:
        print_json(catalogue_document(CATALOGUE))
    else:
        click.echo(catalogue_text(CATALOGUE))
