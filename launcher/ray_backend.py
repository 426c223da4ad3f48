"""Ray: the only module that imports it. Connects, reserves nodes, starts actors; where they go is in ray_placement.

Ray places agents and restarts controllers. Nothing else goes through it: the controller talks to the agents over
connections of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from jobs.paths import RunPaths
from launcher.aside import Aside
from launcher.backend import NodeInfo
from launcher.backends import agent_options as options_of
from launcher.ray_actors import AgentHost, ControllerHost, die, on_termination
from launcher.ray_client import cluster_record, reach, wait_gone
from launcher.ray_errors import auth_environment, no_head, refused, unknown_ray, unwell
from launcher.ray_node import VISITOR, local_node
from launcher.ray_placement import AgentPlacement, run_key
from launcher.ray_reservations import Bundle, RayNode, Resources, device_count
from launcher.store import RunStore
from strategies.specs import ClusterSpec

NAMESPACE = "phalanx"
STEADY = {"num_cpus": 0, "label_selector": {VISITOR[0]: f"!{VISITOR[1]}"}}
"""Options of an actor that needs nothing: Ray would put it anywhere, a client's node included, which soon leaves."""
NODE_ID = "ray.io/node-id"  # a label that Ray gives every node
HEAD = "node:__internal_head__"  # a resource that only the head's node has


class RayBackend(AgentPlacement):
    """Agents on the nodes of a Ray cluster; see :class:`launcher.backend.Backend`.

    Args:
        run_dir: The run directory; its ``cluster.json`` knows how to reach an embedded cluster.
        cluster: What the run needs, and the address of any other cluster.
        agent_options: Fields of :class:`launcher.host.agent.AgentOptions`.

    Raises:
        ClusterError: The cluster cannot be reached, or refuses us.
    """

    def __init__(self, run_dir: Path, cluster: ClusterSpec, *, agent_options: Mapping[str, Any] | None = None) -> None:
        super().__init__(run_dir, cluster, _Cluster(), agent_options=agent_options)
        self._connection = contextlib.ExitStack()
        if not ray.is_initialized():  # inside an actor it is
            self._connection.enter_context(connected(run_dir.resolve(), cluster.address))

    def close(self) -> None:
        """Drop the connection; agents and reservations stay."""
        self._connection.close()


class _AgentActor(AgentHost):
    """The agent of a node as an actor."""

    def __init__(self, run_dir: str, node: str, bind: str, slots: int, options: Mapping[str, Any]) -> None:
        super().__init__(run_dir, node, bind, slots, options, leave=leave_for_good)
        on_termination(self.notice)


class _Cluster:
    """The cluster that this process is connected to; see :class:`launcher.ray_reservations.Ray`."""

    def __init__(self) -> None:
        self._groups: dict[str, PlacementGroup] = {}  # those that were seen last

    def nodes(self) -> list[RayNode]:
        with _cluster_errors():
            free = ray._private.state.available_resources_per_node()
            return [
                RayNode(
                    node=node["NodeID"],
                    address=node["NodeManagerAddress"],
                    total=node["Resources"],
                    free=free.get(node["NodeID"], {}),
                )
                for node in ray.nodes()
                if node["Alive"]
            ]

    def bundles(self, prefix: str) -> list[Bundle]:
        return [
            Bundle(
                group=table["name"],
                index=index,
                resources=resources,
                node=table["bundles_to_node_id"].get(index, ""),
                moving=table["state"] == "RESCHEDULING",
            )
            for table in self._tables(prefix)
            for index, resources in sorted(table["bundles"].items())
        ]

    def _tables(self, prefix: str) -> list[dict[str, Any]]:
        with _cluster_errors():
            tables = placement_group_table().values()
        mine = [table for table in tables if table["name"].startswith(prefix) and table["state"] != "REMOVED"]
        identities = {table["name"]: bytes.fromhex(table["placement_group_id"]) for table in mine}
        self._groups = {name: PlacementGroup(ray.PlacementGroupID(one)) for name, one in identities.items()}
        return sorted(mine, key=lambda table: str(table["name"]))

    def reserve(self, group: str, bundles: Sequence[Resources], nodes: Sequence[str] = ()) -> None:
        with _cluster_errors():
            wanted, bound = [dict(bundle) for bundle in bundles], [{NODE_ID: node} for node in nodes] or None
            options = {"name": group, "lifetime": "detached", "bundle_label_selector": bound}
            ray.util.placement_group(wanted, strategy="STRICT_SPREAD", **options)

    def unreserve(self, prefix: str) -> None:
        self._tables(prefix)
        for group in self._groups.values():
            with _cluster_errors():
                remove_placement_group(group)

    def start_agent(self, name: str, bundle: Bundle, arguments: tuple[Any, ...], run_dir: Path) -> object:
        place = PlacementGroupSchedulingStrategy(self._groups[bundle.group], placement_group_bundle_index=bundle.index)
        # CPUs are held by the bundle; asking for them here would make Ray set OMP_NUM_THREADS. Of GPUs an actor sees
        # only those that it asks for.
        options = {"num_cpus": 0, "num_gpus": bundle.resources.get("GPU", 0), "max_restarts": 0}
        with _cluster_errors():
            agent = _detached(_AgentActor, name, run_dir, scheduling_strategy=place, **options).remote(*arguments)
            return agent.pid.remote()

    def complaint(self, started: object) -> str:
        if not ray.wait([started], timeout=0)[0]:
            return ""
        try:
            ray.get(started)
        except ray.exceptions.RayError as error:
            return str(error).strip().splitlines()[-1]
        return ""

    def actors(self, prefix: str) -> set[str]:
        with _cluster_errors():
            named = ray.util.list_named_actors(all_namespaces=True)
        return {
            entry["name"] for entry in named if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix)
        }

    def stop(self, name: str, reason: str) -> None:
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            actor = find_actor(name)
            if actor is not None:
                actor.stop.remote(reason)

    def kill(self, name: str) -> None:
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError, ValueError):
            kill(ray.get_actor(name, namespace=NAMESPACE))


def _detached(kind: type, name: str, run_dir: Path, **options: Any) -> Any:
    """An actor class that outlives this process and imports our packages from the run directory, if they are there."""
    code = RunPaths(run_dir).code
    if code.is_dir():
        options["runtime_env"] = {"env_vars": {"PYTHONPATH": f"{code}{os.pathsep}${{PYTHONPATH}}"}}
    return ray.remote(kind).options(name=name, namespace=NAMESPACE, lifetime="detached", **options)


def find_actor(name: str) -> Any:
    """Handle of a named actor that is not dead, or None."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(name, namespace=NAMESPACE)


def kill(actor: Any) -> None:
    """Kill an actor for good, as far as the cluster can be reached."""
    with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
        ray.kill(actor, no_restart=True)


def leave_for_good() -> None:
    """End the actor that calls this, from any of its threads; Ray does not restart it."""
    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


@contextlib.contextmanager
def connected(run_dir: Path, address: str) -> Iterator[None]:
    """Connect this process to a cluster as a driver.

    Args:
        run_dir: The run directory; its ``cluster.json`` knows how to reach an embedded cluster.
        address: ``IP:PORT`` of any other; empty inside a Ray job, which Ray has told where it belongs.

    Raises:
        ClusterError: The cluster cannot be reached, or refuses us.
    """
    record = cluster_record(run_dir)
    embedded = record.get("kind") == "local"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(auth_environment(record.get("token_path"))))
        if embedded:
            address, own = str(record["address"]), "127.0.0.1"
            _pin_loopback()
            reach(address)
            gcs_nodes(address)  # refuses a wrong token at once; ray.init would take 20 s over it
        elif address:
            own = stack.enter_context(local_node(address, [NodeInfo(**node) for node in gcs_nodes(address)]))
        else:
            address, own = "auto", None
        quiet = RunPaths(run_dir).agents
        quiet.mkdir(parents=True, exist_ok=True)
        _init(address, own, quiet)
        stack.callback(ray.shutdown)
        yield


def _init(address: str, own: str | None, quiet: Path) -> None:
    """``ray.init``, with what it does to the process taken back.

    The folder in which a driver stands is put on the import path of its workers, so it stands in an empty one for the
    moment: a user's folder named ``jobs`` would shadow ours.
    """
    here, handler = os.getcwd(), signal.getsignal(signal.SIGTERM)
    ray._private.worker.listen_error_messages = lambda worker, stopped: None  # prints every death of a worker
    os.chdir(quiet)
    try:
        with _cluster_errors():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level="ERROR",
                **({"_node_ip_address": own} if own else {}),
            )
    finally:
        os.chdir(here)
        with contextlib.suppress(ValueError):  # not the main thread: Ray has not touched it either
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _environment(auth: Mapping[str, str]) -> Iterator[None]:
    """Variables that Ray reads, for as long as we are connected; it has read some of them when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    before = {name: os.environ.get(name) for name in auth}
    os.environ.update(auth)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _pin_loopback() -> None:
    """Ray replaces 127.0.0.1 by the address of the machine's network; an embedded cluster must not be seen there."""
    _replace(ray._private.services, "get_node_ip_address", lambda address=None: "127.0.0.1")


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Put ours in the place of a private function of Ray's; a ClusterError if this version has none of that name."""
    if not callable(getattr(owner, name, None)):
        raise unknown_ray(ray.__version__, f"{owner.__name__}.{name}")
    setattr(owner, name, function)


@contextlib.contextmanager
def _cluster_errors() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.AuthenticationError as error:
        raise refused() from error
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, TimeoutError) as error:
        raise unwell(error) from error


# --- the controller on a cluster ----------------------------------------------------------------------------------


class _ControllerActor(ControllerHost):
    """The controller of a run as an actor."""

    def __init__(self, run_dir: str, resume: Mapping[str, Any] | None, adopt: bool, order: str) -> None:
        on_termination(die)
        super().__init__(run_dir, _backend_of, leave_for_good, order=order, resume=resume, adopt=adopt)


def _backend_of(store: RunStore) -> Aside:
    request = store.request()
    return Aside(RayBackend(store.paths.root, request.cluster, agent_options=options_of(request)))


def create_controller(run_dir: Path, resume: Mapping[str, Any] | None, adopt: bool, order: str) -> Any:
    """Create the detached controller actor of a run, which Ray restarts on another node when its own is lost.

    Raises:
        ResumeRefused: There is one, and it does not leave.
    """
    name = f"phalanx-{run_key(run_dir)}-controller"
    with _cluster_errors():
        wait_gone(lambda: find_actor(name), RunPaths(run_dir))
        place = {**STEADY, **_at_the_head()}
        actor = _detached(_ControllerActor, name, run_dir, max_restarts=-1, max_task_retries=-1, **place)
        return actor.remote(str(run_dir), resume, adopt, order)


def _at_the_head() -> dict[str, Any]:
    """Options that place an actor on the head's node, if the cluster has one that says so.

    Where the head falls everything has to start again anyway, while a controller that falls with a worker node is
    started again only when Ray has noticed, a minute later at its defaults. A grain of the head's own resource is what
    binds it: of an actor that asks for nothing, Ray picks the node by chance, whatever its scheduling strategy says.
    """
    known = any(node["Alive"] and HEAD in node["Resources"] for node in ray.nodes())
    return {"resources": {HEAD: 0.001}} if known else {}


def ask(actor: Any, method: str, *arguments: Any, timeout_s: float) -> Any:
    """Call a method of an actor and wait for its answer.

    Raises:
        ClusterError: The actor died, or did not answer in time.
    """
    with _cluster_errors():
        return ray.get(getattr(actor, method).remote(*arguments), timeout=timeout_s)


def run_everywhere(function: Callable[[], str], *, timeout_s: float, besides: Collection[str] = ()) -> dict[str, str]:
    """Run a function on every other node that has devices; node address -> what it returned, or why nothing came."""
    with _cluster_errors():
        task = ray.remote(function)
        answers = {}
        for node in ray.nodes():
            if node["Alive"] and device_count(node["Resources"]) and node["NodeID"] not in besides:
                affinity = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": affinity}
                answers[task.options(**options).remote()] = node["NodeManagerAddress"]
        if not answers:
            return {}
        done, late = ray.wait(list(answers), num_returns=len(answers), timeout=timeout_s)
        words = {answers[ref]: f"it did not answer within {timeout_s:.0f} s" for ref in late}
        for ref in done:
            try:
                words[answers[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                words[answers[ref]] = str(error).strip().splitlines()[-1]
        return words


def spread(function: Callable[[Any], Any], items: Sequence[Any], code: Path) -> Iterator[tuple[int, Any]]:
    """What a function of ours returns for every item, worked on by all processors of the cluster, as it comes."""
    variables = {"PYTHONPATH": f"{code}{os.pathsep}${{PYTHONPATH}}", "TOKENIZERS_PARALLELISM": "false"}
    with _cluster_errors():
        task = ray.remote(runtime_env={"env_vars": variables})(function)
        running = {task.remote(item): index for index, item in enumerate(items)}
        while running:
            yield running.pop(ref := ray.wait(list(running))[0][0]), ray.get(ref)


def gcs_nodes(address: str) -> list[dict[str, Any]]:
    """Living nodes of a cluster, asked of its head without becoming a driver: works from any machine."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        found = GcsClient(address=address).get_all_node_info(timeout=8).values()
    except ray.exceptions.AuthenticationError as error:
        raise refused() from error
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        raise no_head(address, error) from error
    living = [info for info in found if info.state == 0]  # GcsNodeInfo.ALIVE
    rows = [(one.node_id.hex(), one.node_manager_address, device_count(one.resources_total)) for one in living]
    return [{"node": node, "address": where, "slots": slots} for node, where, slots in rows]


def start_node(*arguments: str) -> None:
    """``ray start``, bound to 127.0.0.1 and without the parts that an embedded cluster has no use for.

    The command line cannot say either, so Ray's own functions are replaced in this process before it is called; each
    replacement only narrows what is started.
    """
    from ray._private import node, utils
    from ray.scripts import scripts

    _pin_loopback()
    _replace(scripts, "get_ray_client_dependency_error", lambda: "not wanted")
    _replace(utils, "get_dashboard_dependency_error", lambda: "not wanted")
    _replace(node.Node, "start_api_server", lambda self, **options: None)
    sys.argv = ["ray", "start", *arguments]
    scripts.main()


if __name__ == "__main__":
    from launcher import ray_verbs  # actors must be found under this module's own name on the workers, not __main__

    ray_verbs.main()
