"""From a request to a run that ends: prepare the data, fill the run directory, control or follow, sum up.

Submit and resume share everything here. A run on this machine is controlled by this process; on an existing cluster a
detached controller does it and this process only watches the run directory.

=========  ==================================================================  =======================================
signal     controlling a run (``cluster=local``, ``process``)                  watching one (``cluster=existing``)
=========  ==================================================================  =======================================
SIGINT     the run is cancelled cleanly (exit 103); a second one hurries       detach: the run goes on (exit 0)
SIGTERM    likewise                                                            likewise
SIGHUP     likewise                                                            likewise
SIGKILL    the gang lives on for its lease: ``phalanx resume`` adopts it       the run goes on
=========  ==================================================================  =======================================
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

from jobs.spec import DataSpec
from launcher import backends, build, supervise
from launcher.config import to_yaml
from launcher.controller import Fenced
from launcher.follow import Display, Screen, follow
from launcher.lock import ControllerLock, newest_epoch
from launcher.request import LaunchRequest
from launcher.run import EventKind, RunEvent, RunState
from launcher.schema import Config
from launcher.ship import Shipment, ship_code, ship_project, survey
from launcher.store import RunStore, dump, write_atomic
from strategies.errors import ClusterError, PhalanxError, ResumeRefused, StorageError
from strategies.specs import ClusterSpec

_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")
_PACKAGES = ("phalanx", "torch", "deepspeed", "ray", "numpy", "safetensors", "tokenizers", "wandb", "hydra-core")


CANCEL_PATIENCE_S = 60.0


class Interrupted(BaseException):
    """A signal came while nothing could be cancelled in an orderly way yet, or a second one came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How following a run ended.

    Attributes:
        state: State of the run.
        detached: The run goes on without us.
    """

    state: RunState
    detached: bool = False


def measured(config: Config) -> ClusterSpec | None:
    """The machine as an existing cluster reports it; None for one that phalanx starts.

    Raises:
        ClusterError: The cluster cannot be reached or refuses us.
    """
    if config.cluster.kind != "existing":
        return None
    return build.cluster_spec(config, backends.measure(config.cluster.address or ""))


def prepare_data(config: Config, request: LaunchRequest, screen: Screen) -> LaunchRequest:
    """The request with its data prepared; a script brings its own.

    Raises:
        ConfigError: The corpus is empty, too short, or does not fit the vocabulary.
        StorageError: The corpus cannot be read, or the store cannot be written.
    """
    if request.job.kind == "script":
        return request
    from jobs.data.build import prepare

    assert config.data.cache is not None
    shown: list[str] = []

    def progress(phase: str, fraction: float) -> None:
        if phase not in shown:
            shown.append(phase)
            if phase != "ready":
                screen.say(f"data: {phase}")
        screen.progress(f"data: {phase} {100 * fraction:.0f} %")

    data = prepare(
        DataSpec(kind=config.data.kind, path=config.data.path or ""),
        Path(config.data.cache),
        request.job.model.vocab,
        progress,
        seq=request.job.model.seq,
    )
    return replace(request, job=replace(request.job, data=data))


def project(config: Config) -> Shipment | None:
    """What of the user's project will be shipped; None when the job is not a script.

    Raises:
        ConfigError: The project is missing or too large.
    """
    if config.job.kind != "script":
        return None
    return survey(Path(config.job.workdir), limit_mb=config.job.ship_limit_mb)


def create(request: LaunchRequest, config: Config, shipment: Shipment | None) -> RunStore:
    """Make and fill the run directory; on an error nothing of it is left.

    Raises:
        ConfigError: A run of this name exists.
        StorageError: It cannot be written.
    """
    store = RunStore.create(request)
    try:
        ending.take_ballast(store)
        write_config(store, config, request.overrides)
        write_atomic(store.paths.env, dump(environment()))
        ship_code(store.paths.code)
        if shipment is not None:
            ship_project(shipment, Path(request.job.workdir))
    except BaseException:
        shutil.rmtree(store.paths.root, ignore_errors=True)
        raise
    return store


def write_config(store: RunStore, config: Config, overrides: Sequence[str]) -> None:
    """Store the resolved configuration and what the user typed."""
    write_atomic(store.paths.config, to_yaml(config).encode())
    lines = "".join(f"- {dump(word).decode()}" for word in overrides) or "[]\n"
    write_atomic(store.paths.overrides, lines.encode())


def environment() -> dict[str, Any]:
    """Versions and environment of this process, secrets redacted."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "environment": redacted(os.environ),
    }


def redacted(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables, the values of secret ones hidden."""
    return {
        name: "<redacted>" if any(word in name.upper() for word in _SECRET) else value
        for name, value in sorted(environ.items())
    }


# ---- running ----------------------------------------------------------------------------------------------------


def run(
    store: RunStore,
    screen: Screen,
    *,
    resume: Mapping[str, Any] | None = None,
    adopt: bool = True,
    detach: bool = False,
) -> Outcome:
    """Run until the end, here or on the cluster.

    Args:
        store: A filled run directory.
        screen: Where to show progress.
        resume: A person's wish to continue; None at the first submit.
        adopt: A live gang may be taken over as it is.
        detach: Do not watch a run that is controlled elsewhere.

    Raises:
        ClusterError: The cluster cannot be reached or started.
        ResumeRefused: Another controller owns the run.
    """
    request = store.request()
    steps = request.job.train.steps if request.job.kind == "pretrain" else None
    display = Display(store, steps=steps, onto=screen)
    if request.cluster.kind != "existing":
        return Outcome(state=_control(store, request, display, resume, adopt))
    after = len(store.events())
    if resume is not None:
        supervise.withdraw_cancel(store)
    screen.say(f"starting a controller on the cluster at {request.cluster.address}")
    try:
        backends.start_controller(store, request, resume=resume, adopt=adopt)
    except PhalanxError as error:
        if not newest_epoch(store.paths) and not store.run().state.terminal:  # nobody has ever controlled it
            store.append(EventKind.RUN_FAILED, reason=error.what)
        raise
    if detach:
        return Outcome(state=store.run().state, detached=True)
    return _watch(store, display, after)


def _control(
    store: RunStore, request: LaunchRequest, display: Display, resume: Mapping[str, Any] | None, adopt: bool
) -> RunState:
    lock = ControllerLock.acquire(store.paths)
    signals = _Signals(store, display)
    try:
        with signals, _stdout_kept(), backends.opened(store, request, display.say, display.hint) as backend:
            signals.orderly()
            if resume is not None:
                supervise.withdraw_cancel(store)
            return supervise.control(store, backend, lock, resume=resume, adopt=adopt, observer=display)
    except Interrupted:
        display.say("stopped")
        _conclude(store, lock, EventKind.RUN_CANCELLED, "interrupted twice" if signals.count > 1 else "interrupted")
        return RunState.CANCELLED
    except Fenced as error:
        raise ResumeRefused(
            f"Another controller has taken over '{store.name}'.", hint=f"Follow it: phalanx logs {store.name} -f"
        ) from error
    except ClusterError as error:
        _conclude(store, lock, EventKind.RUN_FAILED, error.what)
        raise
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def _conclude(store: RunStore, lock: ControllerLock, kind: EventKind, reason: str) -> None:
    """Record an end that the controller did not live to see."""
    if not lock.lost() and not store.run().state.terminal:
        store.append(kind, epoch=lock.epoch, reason=reason)


class _Signals:
    """While controlling: the first signal asks for a clean cancel, the second ends at once."""

    def __init__(self, store: RunStore, display: Display) -> None:
        self._store = store
        self._display = display
        self._orderly = False
        self._previous: dict[int, Any] = {}
        self.count = 0

    def orderly(self) -> None:
        """From now on a controller turns, which can cancel cleanly."""
        self._orderly = True

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 or not self._orderly:
            raise Interrupted
        supervise.request_cancel(self._store, by=f"{signal.Signals(number).name} at the client")
        self._display.say("cancelling cleanly; once more to hurry")


class _Detach(BaseException):
    """A signal while watching."""


def _watch(store: RunStore, display: Display, after: int) -> Outcome:
    def leave(number: int, frame: FrameType | None) -> None:
        raise _Detach

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return Outcome(state=follow(store, display, after=after))
    except _Detach:
        return Outcome(state=store.run().state, detached=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def cancel_orphan(store: RunStore) -> RunState:
    """End a run that nobody controls: become its controller for as long as that takes.

    Raises:
        ResumeRefused: Somebody controls it after all.
    """
    request = store.request()
    if request.cluster.kind == "existing":
        with contextlib.suppress(ClusterError):
            backends.start_controller(store, request)
            return _await_end(store, request)
    lock = ControllerLock.acquire(store.paths)
    try:
        with backends.left_over(store, request) as backend:
            return supervise.control(store, backend, lock)
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def _await_end(store: RunStore, request: LaunchRequest) -> RunState:
    """Until a controller elsewhere has ended the run.

    Raises:
        ClusterError: It takes too long.
    """
    deadline = time.monotonic() + CANCEL_PATIENCE_S + request.recovery.grace_s
    while time.monotonic() < deadline:
        state = store.run().state
        if state.terminal:
            return state
        time.sleep(0.2)
    raise ClusterError(f"'{store.name}' has not ended yet.", hint=f"Look again: phalanx status {store.name}")


# ---- the end ----------------------------------------------------------------------------------------------------


def unproven(request: LaunchRequest, events: Sequence[RunEvent], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Injected faults of which the record does not show that they happened and were noticed.

    A fault is proven by the injector's record, made before it acted, and a failure that the controller detected at or
    after that moment.
    """
    failures = [event.time for event in events if event.kind is EventKind.FAILURE_DETECTED]
    fired = {str(record["fault"]): float(record["time"]) for record in records}
    return [
        fault
        for fault in request.job.faults
        if fault not in fired or not any(when >= fired[fault] for when in failures)
    ]


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """Whatever libraries print meanwhile goes to stderr: stdout is for the result alone."""
    sys.stdout.flush()
    try:
        ours = os.dup(1)
    except OSError:  # closed already
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


@contextlib.contextmanager
def closing(screen: Screen) -> Iterator[Screen]:
    """The screen, given back at the end whatever happens."""
    try:
        yield screen
    finally:
        screen.close()
        sys.stderr.flush()


def check_parent(folder: Path) -> None:
    """The parent of run directories can be written, before anything expensive is done.

    Raises:
        StorageError: It cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"Run directories cannot be made in {folder}.", why=str(error), hint="Choose another run.dir=DIR."
        ) from error
