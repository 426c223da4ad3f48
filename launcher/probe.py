"""Measuring a cluster: a short run whose ranks measure instead of training (:mod:`jobs.probe`), and its results.

It goes the way of every other run, so the figures are those that training will get: the same agents and environment,
the same transport, the checkpoints' own disk. Its run directory is removed at the end; when it is over, nothing is left
of it anywhere, also after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.paths import RunPaths
from jobs.probe import FOLDER, Record, record_path
from launcher import build, launch, supervise
from launcher.config import conf_dir
from launcher.follow import Screen
from launcher.lock import newest_epoch
from launcher.probe_results import Probed, summarise
from launcher.request import LaunchRequest
from launcher.run import RunState
from launcher.schema import Config
from launcher.ship import Shipment
from launcher.store import RunStore
from strategies.errors import ConfigError, RunCancelled, RunFailed, StorageError
from strategies.specs import ClusterSpec

WAIT_FOR_NODES_S = 60.0
LEASE_S = 15.0  # for the ranks of a probe whose command was killed
END_S = 60.0
SHARED_S = 10.0  # until what a rank wrote on another machine is seen here
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def measure(config: Config, overrides: Sequence[str], screen: Screen, *, quick: bool) -> tuple[Probed, ClusterSpec]:
    """Measure the cluster that a configuration names.

    Args:
        config: The configuration; its ``cluster`` and ``run.dir`` count.
        overrides: What the user typed.
        screen: Shows how far it is.
        quick: Take a few seconds instead of a minute.

    Returns:
        What was found, and the cluster with its size.

    Raises:
        ClusterError: The cluster cannot be reached, refuses us, or cannot be started.
        PlanInfeasible: The cluster is smaller than the configuration says.
        RunCancelled: The user has stopped it.
        RunFailed: A rank could not measure.
        StorageError: The run directory cannot be written, or is not shared with every node.
    """
    settled = _settled(config, quick=quick)
    screen.say(f"probing cluster={config.cluster.name} with {settled.run.dir} as its storage")
    request = build.build_request(settled, overrides, launch.measured(settled))
    with _run_directory(settled, request) as store:
        state = _run(store, screen)
        if state is RunState.CANCELLED:
            raise RunCancelled("The probe was cancelled; nothing was written.")
        if state is not RunState.SUCCEEDED:
            raise _failed(store)
        records = _records(store.paths, request.cluster.slots)
        return summarise(records, detect_s=request.recovery.detect_s), request.cluster


def _settled(config: Config, *, quick: bool) -> Config:
    """The configuration of the probe's own run."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    recovery = replace(
        config.recovery,
        max_restarts=0,
        lease_s=LEASE_S,
        wait_for_nodes_s=min(WAIT_FOR_NODES_S, config.recovery.wait_for_nodes_s),
    )
    named = replace(config, run=replace(config.run, name=f"probe-{stamp}-{secrets.token_hex(2)}"), recovery=recovery)
    settled = build.settle(named, name="", cwd=Path.cwd())
    code = RunPaths(Path(settled.run.dir) / str(settled.run.name)).code
    command = _command(code, quick=quick, disk=config.strategy.offload_path or "")
    job = replace(settled.job, kind="script", command=command)
    # Every node is measured, the spares too, and every slot of it.
    cluster, strategy = replace(settled.cluster, spares=0), type(settled.strategy)()
    tracking = replace(settled.tracking, kind="none")
    return replace(settled, job=job, cluster=cluster, strategy=strategy, tracking=tracking, faults=())


def _command(code: Path, *, quick: bool, disk: str) -> str:
    """A script sees none of our packages, and this one is ours; without a disk it takes the temporary folder."""
    path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    options = ["--quick"] * quick + ["--disk", shlex.quote(disk)] * bool(disk)
    return shlex.join(["sh", "-c", f"{path}; exec python -P -m jobs.probe {' '.join(options)}"])


@contextlib.contextmanager
def _run_directory(config: Config, request: LaunchRequest) -> Iterator[RunStore]:
    """The probe's run, ended and removed at the end, however that comes."""
    parent = Path(config.run.dir)
    fresh = not parent.exists()
    launch.check_parent(parent)
    try:
        store = launch.create(request, config, Shipment(root=parent, files=(), bytes=0, largest=()))
        try:
            yield store
        finally:
            _end(store)
            shutil.rmtree(store.paths.root, ignore_errors=True)
    finally:
        if fresh:
            with contextlib.suppress(OSError):  # somebody else has begun to use it
                parent.rmdir()


def _run(store: RunStore, screen: Screen) -> RunState:
    """Until the run is over; one on another machine is cancelled when the user stops to watch it."""
    watched = ProbeScreen(screen, store.paths)
    outcome = launch.run(store, watched)
    if not outcome.detached:
        return outcome.state
    screen.say("cancelling the probe")
    _end(store)
    return RunState.CANCELLED


def _end(store: RunStore) -> None:
    """Nothing of the run goes on, on any node.

    Raises:
        StorageError: It could not be ended; the run directory stays, for ``phalanx cancel``.
    """
    if not newest_epoch(store.paths):  # nobody has ever controlled it
        return
    deadline = time.monotonic() + END_S
    if not store.run().state.terminal:
        supervise.request_cancel(store, by="phalanx cluster probe")
    while not (store.run().state.terminal and _released(store.paths)):
        if time.monotonic() > deadline:
            raise StorageError(
                f"The probe has not ended within {END_S:.0f} s.",
                hint=f"phalanx cancel {store.name} --dir {store.paths.root.parent}",
            )
        time.sleep(0.1)


def _released(paths: RunPaths) -> bool:
    """Whether its last controller has given everything back."""
    return (paths.controllers / f"{newest_epoch(paths)}.released").exists()


class ProbeScreen(Screen):
    """Shows what the ranks are at instead of the steps of a training run.

    Args:
        onto: The screen of the command.
        paths: The probe's run directory.
    """

    def __init__(self, onto: Screen, paths: RunPaths) -> None:
        self._onto = onto
        self._phase = paths.root / FOLDER / "progress"
        self._shown = ""
        self.bar = 0

    def say(self, text: str) -> None:
        """Sentences pass, but for the events of a run: there is no training here."""
        if not text.startswith("["):
            self._onto.say(text)

    def progress(self, text: str) -> None:
        """The phase that the ranks are in, each of them once; before the first, how the cluster starts."""
        try:
            phase = self._phase.read_text()
        except OSError:
            phase = ""
        if not phase:
            self._onto.progress(text if "Ray" in text else "starting the ranks")
        elif phase != self._shown:
            self._shown = phase
            self._onto.say(f"measured: {phase}" if phase == "done" else f"measuring: {phase}")


def _failed(store: RunStore) -> RunFailed:
    """What the ranks have left of their reasons; one falls first, the others miss it."""
    reasons = {path: path.read_text() for path in sorted((store.paths.root / FOLDER).glob("error-*.txt"))}
    first = min(reasons, key=lambda path: path.stat().st_mtime_ns, default=None)
    why = reasons[first] if first else store.run().reason
    hint = (
        "Install torch where the nodes' Python looks: pip install 'phalanx[train]'"
        if "cannot be imported" in why
        else ""
    )
    return RunFailed(
        "The probe failed.", why=why, hint=hint or "Check that nothing else uses the cluster, then try again."
    )


def _records(paths: RunPaths, ranks: int) -> list[Record]:
    """What every rank has measured.

    Raises:
        StorageError: A record is missing.
    """
    files = [record_path(paths.root, rank) for rank in range(ranks)]
    deadline = time.monotonic() + SHARED_S
    while missing := [file for file in files if not file.exists()]:
        if time.monotonic() > deadline:
            raise StorageError(
                f"The results of {len(missing)} of {ranks} ranks are not in {missing[0].parent}.",
                hint="Choose a run.dir on a file system that every node mounts at the same path.",
            )
        time.sleep(0.2)
    return [json.loads(file.read_text()) for file in files]


# ---- the file that is made --------------------------------------------------------------------------------------


def target_of(out: str | None, name: str | None, *, force: bool) -> tuple[Path, str]:
    """The file to write and the name of the choice in it, checked before anything is measured.

    Args:
        out: ``--out``; by default ``conf/cluster/NAME.yaml``.
        name: ``--name``; by default that of the file, or ``probed``.
        force: An existing file may be replaced.

    Raises:
        ConfigError: The name is none, the file exists, or it is not a YAML file.
    """
    file = Path(out or f"conf/cluster/{name or 'probed'}.yaml").absolute()
    chosen = name or file.stem
    if not _NAME.fullmatch(chosen):
        raise ConfigError(f"{chosen!r} is no name for a cluster.", hint="Use letters, digits and ._- only.")
    if file.suffix != ".yaml":
        raise ConfigError(f"{file} is not called *.yaml.", hint=f"--out {file.with_suffix('.yaml')}")
    if file.exists() and not force:
        raise ConfigError(f"{file} exists.", hint="Choose another --name or --out, or add --force to replace it.")
    return file, chosen


def command_of(file: Path, missing: Sequence[str]) -> str:
    """The command that plans with a cluster file; what it lacks has to be given with it."""
    folder = file.parent.parent
    words = [] if folder == conf_dir() else [f"hydra.searchpath=[file://{folder}]"]
    words += [f"cluster={file.stem}", *(f"cluster.hardware.{key}=VALUE" for key in missing)]
    return f"phalanx plan {shlex.join(words)}"


def known_devices() -> list[str]:
    """Kinds of devices that the shipped cluster files name."""
    texts = (path.read_text() for path in sorted((conf_dir() / "cluster").glob("*.yaml")))
    return sorted({found for text in texts for found in re.findall(r"^device: *\"?([^\s\"#]+)", text, re.MULTILINE)})
