"""``phalanx cluster``: verbs about the machines rather than about a run. ``probe`` measures them."""

from __future__ import annotations

import datetime

import click

from launcher.commands.common import json_option, overrides_argument, print_json, say
from launcher.commands.groups import Nearest


@click.group(
    "cluster",
    cls=Nearest,
    short_help="Measure a cluster.",
    epilog="Example: phalanx cluster probe cluster=local --quick",
)
def command() -> None:
    """Verbs about the machines."""


@command.command(
    "probe",
    short_help="Measure a cluster and write a cluster file.",
    epilog="Example: phalanx cluster probe cluster=existing cluster.address=10.0.0.1:6379 run.dir=/shared/runs",
)
@click.option("--out", metavar="FILE", help="Where to write (default: conf/cluster/NAME.yaml).")
@click.option("--name", metavar="NAME", help="Name of the cluster (default: that of FILE, or 'probed').")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--quick", is_flag=True, help="Measure for seconds instead of about a minute.")
@json_option
@overrides_argument
def probe(
    out: str | None, name: str | None, force: bool, quick: bool, as_json: bool, overrides: tuple[str, ...]
) -> None:
    """Measure matmuls, memory, links and disk on every node, and write a cluster file that the planner reads.

    The cluster must be idle. What cannot be measured (prices, failure rates) is zero in the file and has to be filled
    in. Checkpoints go to run.dir, so its disk is measured; with cluster=existing every node must see it. The local disk
    is that of strategy.offload_path=FOLDER, else of the temporary folder.

    Ctrl-C ends it, with everything that it has started.
    """
    from launcher import launch, probe, render_probe
    from launcher.config import compose
    from launcher.follow import screen
    from launcher.probe_results import device_key
    from launcher.store import write_atomic

    file, chosen = probe.target_of(out, name, force=force)
    config = compose(overrides)
    with launch.closing(screen()) as shown:
        found, cluster = probe.measure(config, overrides, shown, quick=quick)
    device = device_key(found.device, probe.known_devices())
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = render_probe.cluster_yaml(found, cluster, name=chosen, device=device, when=when, quick=quick)
    write_atomic(file, text.encode())
    usage = probe.command_of(file, found.missing)
    if as_json:
        print_json(render_probe.probe_document(found, file=str(file), command=usage, name=chosen, device=device))
    else:
        click.echo(f"{render_probe.probe_text(found)}\n\nwritten: {file}\nuse it:  {usage}")
    if file.parent.name != "cluster":
        say(f"note: choices are found in folders named 'cluster' only: move {file.name} to one")
