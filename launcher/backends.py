"""Opens the cluster that a request names. The kinds are loaded when they are used, so that Ray stays optional."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from launcher.aside import Aside
from launcher.backend import Backend
from launcher.host.accelerator import devices
from launcher.host.dealing import Deal, deal
from launcher.lock import displaced
from launcher.request import LaunchRequest
from launcher.store import RunStore
from launcher.supervise import NoCluster
from strategies.errors import ClusterError

if TYPE_CHECKING:
    from launcher.ray_process import RayProcess

Say = Callable[[str], None]


@contextlib.contextmanager
def opened(store: RunStore, request: LaunchRequest, say: Say, progress: Say) -> Iterator[Backend]:
    """The backend of a run that this process controls; nothing of it is left at the end.

    Args:
        store: The run.
        request: What to run.
        say: Told in sentences what happens.
        progress: Told in a line how far it is.

    Raises:
        ClusterError: The cluster cannot be started.
    """
    if note := dealt(request).note:
        say(note)
    if request.cluster.kind == "process":
        with _processes(store, request) as backend:
            yield backend
    else:
        with _embedded(store, request, say, progress) as backend:
            yield backend


@contextlib.contextmanager
def left_over(store: RunStore, request: LaunchRequest) -> Iterator[Backend]:
    """The backend of a run that is to be ended: what is still there, and nothing new."""
    if request.cluster.kind == "process":
        with _processes(store, request) as backend:
            yield backend
    elif request.cluster.kind == "local":
        from launcher.embedded import EmbeddedCluster

        cluster = EmbeddedCluster.find(store.paths.root)
        with contextlib.ExitStack() as stack:
            stack.callback(EmbeddedCluster(store.paths.root).stop)
            yield NoCluster() if cluster is None else stack.enter_context(_ray(store, request))
    else:
        yield NoCluster()  # it cannot be reached: nothing of it can be ended from here


@contextlib.contextmanager
def _processes(store: RunStore, request: LaunchRequest) -> Iterator[Backend]:
    from launcher.host.agent import AgentOptions
    from launcher.local_backend import LocalBackend

    processes = LocalBackend(store.paths, request.cluster, options=AgentOptions(**agent_options(request)))
    try:
        yield processes
    finally:
        processes.release()
        processes.close()


@contextlib.contextmanager
def _embedded(store: RunStore, request: LaunchRequest, say: Say, progress: Say) -> Iterator[Backend]:
    _need_ray()
    from launcher.embedded import EmbeddedCluster

    spec, secret = request.cluster, store.secret()
    nodes = spec.nodes + spec.spares
    found = EmbeddedCluster.find(store.paths.root)
    say(f"starting a Ray cluster of {nodes} nodes on this machine" if found is None else "the Ray cluster still lives")
    cluster = EmbeddedCluster.start(
        store.paths.root,
        nodes=nodes,
        slots_per_node=spec.slots_per_node,
        enough=spec.nodes,
        keep_s=2 * request.recovery.lease_s,
        progress=lambda done, total: progress(f"starting Ray: {done} of {total} nodes are up"),
    )
    try:
        with _ray(store, request) as backend:
            yield backend
    finally:
        if not displaced(store.paths, secret):
            cluster.stop()


@contextlib.contextmanager
def _ray(store: RunStore, request: LaunchRequest) -> Iterator[Backend]:
    _need_ray()
    from launcher.ray_backend import RayBackend

    backend = Aside(RayBackend(store.paths.root, request.cluster, agent_options=agent_options(request)))
    try:
        yield backend
    finally:
        backend.close()


def agent_options(request: LaunchRequest) -> dict[str, Any]:
    """How agents of this run behave: fields of :class:`launcher.host.agent.AgentOptions`."""
    recovery = request.recovery
    options: dict[str, Any] = {
        "detect_s": recovery.detect_s,
        "lease_s": recovery.lease_s,
        "grace_s": recovery.grace_s,
        "preempt_grace_s": recovery.preempt_grace_s,
        "kill_patience_s": recovery.kill_patience_s,
        "env": dealt(request).environment,
    }
    if request.job.kind == "script":  # it imports what it needs by itself: torch in the pool would be of no use to it
        return options | {"warm": ""}
    store = request.job.checkpoint.url or ""
    return options | ({"warm": "jobs.warm:warm_s3"} if store.startswith("s3") else {})


def dealt(request: LaunchRequest) -> Deal:
    """Which devices the nodes of a run get that are started on this machine; others have their own."""
    cluster = request.cluster
    found = devices(os.environ) if cluster.kind in ("process", "local") else None
    return deal(found, nodes=cluster.nodes, slots=cluster.slots_per_node)


def _need_ray() -> None:
    if find_spec("ray") is None:
        raise ClusterError("Ray is not installed.", hint="pip install 'phalanx[ray]', or use cluster=process.")


@contextlib.contextmanager
def asking(overrides: Sequence[str]) -> Iterator[RayProcess | None]:
    """Whom to ask about a running cluster again and again; its start-up goes on while its client does something else.

    Args:
        overrides: What the user typed; that it names a running cluster has to be seen before it is composed, which
            takes as long as importing Ray.
    """
    dashboard = any(word.startswith("cluster.address=http") for word in overrides)
    if "cluster=existing" not in overrides or dashboard or find_spec("ray") is None:
        yield None
        return
    from launcher.ray_process import RayProcess

    with RayProcess() as ray:
        ray.start()
        yield ray


def measure(address: str, ray: RayProcess | None = None) -> tuple[int, int]:
    """Number of nodes of a running cluster, and of the slots that each of them has.

    Raises:
        ClusterError: The cluster cannot be reached or refuses us.
    """
    _need_ray()
    from launcher.ray_client import measure as ask

    return ask(address, ray)


def start_controller(
    store: RunStore,
    request: LaunchRequest,
    *,
    resume: Mapping[str, Any] | None = None,
    adopt: bool = True,
    ray: RayProcess | None = None,
) -> None:
    """Start a detached controller on a running cluster; returns when it has won control.

    Raises:
        ClusterError: The cluster cannot be reached, refuses us, or could not start the controller.
        StorageError: The run directory is not shared with every node.
        ResumeRefused: Another controller owns the run.
    """
    _need_ray()
    from launcher.ray_client import start_controller as start

    start(store.paths.root, request.cluster.address, resume=resume, adopt=adopt, ray=ray)
