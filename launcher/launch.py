"""From a request to a run that ends: prepare the data, fill the run directory, control or follow, sum up.

Submit and resume share everything here. A run on this machine is controlled by this process; on an existing cluster a
detached controller does it and this process only watches the run directory.

=========  ==================================================================  =======================================
signal     controlling a run (``cluster=local``, ``process``)                  watching one (``cluster=existing``)
=========  ==================================================================  =======================================
SIGINT     the run is cancelled cleanly (exit 103); a second one hurries       detach: the run goes on (exit 0)
SIGTERM    likewise                                                            likewise
SIGHUP     likewise; under ``nohup`` nothing                                   likewise; under ``nohup`` nothing
SIGKILL    the gang lives on for its lease: ``phalanx resume`` adopts it       the run goes on
=========  ==================================================================  =======================================
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from jobs import disks
from launcher import backends, build, ending, proposal, supervise
from launcher.config import to_yaml
from launcher.ending_signals import heard
from launcher.follow import Display, Screen, follow
from launcher.lock import ControllerLock, newest_epoch
from launcher.logbook import Fenced
from launcher.redaction import environment
from launcher.request import LaunchRequest
from launcher.run import EventKind, RunState
from launcher.schema import Config
from launcher.ship import Shipment, renew_code, same_code, ship_code, ship_project, survey
from launcher.store import RunStore, dump, taken, write_atomic
from strategies.errors import ClusterError, PhalanxError, ResumeRefused, StorageError
from strategies.plan import ParallelPlan
from strategies.specs import ClusterSpec

if TYPE_CHECKING:
    from launcher.ray_process import RayProcess


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


def measured(config: Config, ray: RayProcess | None = None) -> ClusterSpec | None:
    """The machine as an existing cluster reports it; None for one that phalanx starts.

    Args:
        config: Names the cluster.
        ray: Whom to ask, if there is somebody already.

    Raises:
        ConfigError: The configuration does not say where the cluster is.
        ClusterError: The cluster cannot be reached or refuses us.
    """
    if config.cluster.kind != "existing":
        return None
    return build.cluster_spec(config, backends.measure(build.existing_address(config), ray))


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
        write_atomic(store.paths.env, dump(environment()), mode=0o600)
        ship_code(store.paths.code)
        if shipment is not None:
            ship_project(shipment, Path(request.job.workdir))
        store.place_checkpoints(request)  # last: what is elsewhere does not go away with the run directory
    except BaseException:
        shutil.rmtree(store.paths.root, ignore_errors=True)
        raise
    return store


def write_config(store: RunStore, config: Config, overrides: Sequence[str]) -> None:
    """Store the resolved configuration and what the user typed."""
    resolved, typed = config_files(config, overrides)
    write_atomic(store.paths.config, resolved)
    write_atomic(store.paths.overrides, typed)


def config_files(config: Config, overrides: Sequence[str]) -> tuple[bytes, bytes]:
    """Content of ``config.yaml`` and ``overrides.yaml``."""
    lines = "".join(f"- {dump(word).decode()}" for word in overrides) or "[]\n"
    return to_yaml(config).encode(), lines.encode()


# ---- running ----------------------------------------------------------------------------------------------------


def run(
    store: RunStore,
    screen: Screen,
    *,
    request: LaunchRequest | None = None,
    resume: Mapping[str, Any] | None = None,
    adopt: bool = True,
    detach: bool = False,
    ray: RayProcess | None = None,
) -> Outcome:
    """Run until the end, here or on the cluster. Nothing of the run changes before control of it is won.

    Args:
        store: A filled run directory.
        screen: Where to show progress.
        request: What the run will be (the proposal of a resume); None for what it is.
        resume: A person's wish to continue (:func:`launcher.proposal.accept`); None at the first submit.
        adopt: A live gang may be taken over as it is.
        detach: Do not watch a run that is controlled elsewhere.
        ray: Whom to ask for a controller on the cluster, if there is somebody already; not needed afterwards.

    Raises:
        ClusterError: The cluster cannot be reached or started.
        ResumeRefused: Another controller owns the run.
        StorageError: The run directory cannot be written.
    """
    request = request or store.request()
    steps = None if request.job.kind == "script" else request.job.train.steps
    display = Display(store, steps=steps, onto=screen)
    try:
        if request.cluster.kind != "existing":
            return Outcome(state=_control(store, request, display, resume, adopt))
        return _control_there(store, request, display, resume, adopt, detach, ray)
    except (ResumeRefused, ClusterError):  # nothing will come of it
        if resume and resume.get("request"):
            proposal.discard(store, str(resume["request"]))
        raise


def _control_there(
    store: RunStore,
    request: LaunchRequest,
    display: Display,
    resume: Mapping[str, Any] | None,
    adopt: bool,
    detach: bool,
    ray: RayProcess | None,
) -> Outcome:
    after = len(store.events())
    if resume is not None:
        _renew_code(store, display)
    display.say(f"starting a controller on the cluster at {request.cluster.address}")
    try:
        backends.start_controller(store, request, resume=resume, adopt=adopt, ray=ray)
    except PhalanxError as error:
        refused = isinstance(error, ResumeRefused)  # it is another's
        if not refused and not newest_epoch(store.paths) and not store.run().state.terminal:
            with contextlib.suppress(StorageError):
                store.append(EventKind.RUN_FAILED, reason=error.what)
        raise
    finally:
        if ray is not None:
            ray.close()
    if detach:
        return Outcome(state=store.run().state, detached=True)
    return _watch(store, display, after)


def _control(
    store: RunStore, request: LaunchRequest, display: Display, resume: Mapping[str, Any] | None, adopt: bool
) -> RunState:
    lock = ControllerLock.acquire(store.paths)
    signals = _Signals(store, display)
    try:
        with signals, _stdout_kept():
            if resume is not None:
                _renew_code(store, display)
                resume = proposal.accept(store, resume)
            with backends.opened(store, request, display.say, display.hint) as backend:
                signals.orderly()
                return supervise.control(store, backend, lock, resume=resume, adopt=adopt, observer=display)
    except Interrupted as why:
        display.say("stopped")
        ending.conclude(store, lock, EventKind.RUN_CANCELLED, str(why))
        return RunState.CANCELLED
    except Fenced as error:
        if lock.displaced():
            raise ResumeRefused(
                f"'{store.name}' has ended: its run directory was moved, deleted or unmounted while it lived.",
                why=f"what is in {store.paths.root} now is not of this run",
                hint="Bring it back, or phalanx resume RUN --moved goes on where it is now.",
            ) from error
        raise ResumeRefused(
            f"Another controller has taken over '{store.name}'.", hint=f"Follow it: phalanx logs {store.name} -f"
        ) from error
    except (ClusterError, StorageError) as error:
        with contextlib.suppress(StorageError):  # the error itself says more than that it cannot be recorded
            ending.conclude(store, lock, EventKind.RUN_FAILED, ending.in_a_line(error))
        raise
    finally:
        lock.release()


def _renew_code(store: RunStore, display: Display) -> None:
    """Bring the run's copy of our packages to this version, unless processes may still run from it."""
    if store.run().state.terminal or not store.paths.code.exists():
        if renew_code(store.paths.code):
            display.say("the run's copy of phalanx was another version: it was renewed")
    elif not same_code(store.paths.code):
        display.say("the run goes on with its own copy of phalanx, which is another version than this one")


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
        for number in heard():
            self._previous[number] = signal.signal(number, self._handle)

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 or not self._orderly:
            raise Interrupted("interrupted twice" if self.count > 1 else "interrupted")
        try:
            supervise.request_cancel(self._store, by=f"{signal.Signals(number).name} at the client")
        except StorageError as error:  # it cannot be asked for: end the gang from here
            raise Interrupted(f"interrupted; {ending.in_a_line(error)}") from error
        self._display.say("cancelling cleanly; once more to hurry")


class _Detach(BaseException):
    """A signal while watching."""


def _watch(store: RunStore, display: Display, after: int) -> Outcome:
    def leave(number: int, frame: FrameType | None) -> None:
        raise _Detach

    previous = {number: signal.signal(number, leave) for number in heard()}
    try:
        state = follow(store, display, after=after)
        _await_release(store)
        return Outcome(state=state)
    except _Detach:
        return Outcome(state=store.run().state, detached=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _await_release(store: RunStore, patience_s: float = 20.0) -> None:
    """The end is recorded before everything is given back: who sees us exit may rely on both."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        epoch = newest_epoch(store.paths)
        if not epoch or (store.paths.controllers / f"{epoch}.released").exists():
            return
        time.sleep(0.1)


# ---- the end ----------------------------------------------------------------------------------------------------


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


def check_place(run_dir: Path) -> None:
    """A run directory can be made there, before anything expensive is done.

    Raises:
        ConfigError: A run of this name exists.
        StorageError: Its parent cannot be written.
    """
    if os.path.exists(run_dir):  # a name that no file can have is refused elsewhere
        raise taken(run_dir)
    check_parent(run_dir.parent)


def check_disks(plan: ParallelPlan, cluster: ClusterSpec) -> None:
    """State can be kept on the disks of this machine, if the plan asks for it and the ranks run here.

    Raises:
        ConfigError: DeepSpeed's op for it has not been compiled.
        StorageError: It cannot be kept there.
    """
    if disks.on_disks(plan) and cluster.kind != "existing":
        disks.require_op()
        disks.require_folder(plan.offload_path)


def check_parent(folder: Path) -> None:
    """The parent of run directories can be made and written. It is not made yet: perhaps there will be no run.

    Raises:
        StorageError: It cannot.
    """
    try:
        there = next(one for one in (folder, *folder.parents) if one.exists())
        probe = there / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(b"x")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"Run directories cannot be made in {folder}.",
            why=error.strerror or str(error),
            hint="Choose another run.dir=DIR.",
        ) from error
