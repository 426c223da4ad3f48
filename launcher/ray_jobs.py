"""The Ray Jobs REST interface of a dashboard, with nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from jobs.paths import RunPaths
from launcher.backend import NodeInfo
from launcher.ray_errors import refused
from strategies.errors import ClusterError, StorageError

REQUEST_S = 10.0
NOT_SHARED = 47
"""Exit code of an entrypoint that does not find the run directory on its node."""


def describe(address: str) -> list[NodeInfo]:
    """The living nodes that have devices, as the dashboard shows them.

    Raises:
        ClusterError: No dashboard answers there, or it refuses us.
    """
    document = _call(address, "/nodes?view=summary")
    found = []
    for entry in document.get("data", {}).get("summary", []):
        raylet = entry.get("raylet", {})
        total = raylet.get("resourcesTotal", {})
        slots = int(total.get("GPU", 0)) or int(total.get("CPU", 0))
        if raylet.get("state") == "ALIVE" and slots:
            node = NodeInfo(node=raylet["nodeId"], address=raylet.get("nodeManagerAddress") or entry["ip"], slots=slots)
            found.append(node)
    return found


def run_entrypoint(address: str, paths: RunPaths, order: str, *, timeout_s: float) -> dict[str, Any]:
    """Run our submission as a job on the cluster and return its answer.

    The job only creates a detached controller and ends: Ray never runs an entrypoint again.

    Raises:
        StorageError: The run directory is not there on the node that runs jobs.
        ClusterError: No dashboard answers, it refuses us, or the job failed.
    """
    from launcher.ray_client import answer_in

    body = {
        "entrypoint": _entrypoint(paths, order),
        "runtime_env": {"env_vars": {"PYTHONPATH": f"{paths.code}{os.pathsep}${{PYTHONPATH}}"}},
        "entrypoint_num_cpus": 0,
        "metadata": {"phalanx_run": paths.root.name},
    }
    job = str(_call(address, "/api/jobs/", body)["submission_id"])
    try:
        info = _await_end(address, job, timeout_s)
    except BaseException:
        with contextlib.suppress(ClusterError):
            _call(address, f"/api/jobs/{job}/stop", {})
        raise
    if info.get("driver_exit_code") == NOT_SHARED:
        raise not_shared(paths.root, "the node that runs jobs", "it does not exist there")
    logs = str(_call(address, f"/api/jobs/{job}/logs").get("logs", ""))
    return answer_in(logs, what=f"The controller could not be started by the job {job}.")


def _await_end(address: str, job: str, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while True:
        info = _call(address, f"/api/jobs/{job}")
        if info.get("status") in ("SUCCEEDED", "FAILED", "STOPPED"):
            return info
        if time.monotonic() > deadline:
            raise ClusterError(
                f"The job {job} that starts the controller did not end within {timeout_s:.0f} s.",
                why=str(info.get("message") or info.get("status")),
                hint=f"See {address}, or: ray job logs {job}",
            )
        time.sleep(0.3)


def not_shared(root: Path, node: str, why: str) -> StorageError:
    """The run directory is not what every node sees under its path."""
    return StorageError(
        f"The run directory {root} is not shared with {node}.",
        why=why,
        hint="Choose a run.dir on a file system that every node of the cluster mounts at the same path.",
    )


def _entrypoint(paths: RunPaths, order: str) -> str:
    """A shell command, run with the first Python that has Ray: the PATH of a job need not lead to the cluster's."""
    module = shlex.join(["-P", "-m", "launcher.ray_backend", "submit", str(paths.root), order])
    candidates = " ".join(shlex.quote(name) for name in (sys.executable, "python3", "python"))
    return (
        f"test -d {shlex.quote(str(paths.code))} || exit {NOT_SHARED}; "
        f"for p in {candidates}; do "
        f'"$p" -P -c "import importlib.util as u, sys; sys.exit(u.find_spec(\'ray\') is None)" 2>/dev/null '
        f'&& exec "$p" {module}; done; echo "no Python with Ray on $(hostname)"; exit 1'
    )


def _call(address: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    secret = _token()
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address.rstrip("/") + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_S) as response:
            document = json.loads(response.read())
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise refused() from error
        why = f"{path}: HTTP {error.code} {error.reason}"
        raise _no_dashboard(address, why) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or f"{type(error).__name__}: it does not speak HTTP"
        raise _no_dashboard(address, str(why)) from error
    return document if isinstance(document, dict) else {}


def _no_dashboard(address: str, why: str) -> ClusterError:
    return ClusterError(
        f"No Ray dashboard answers at {address}.",
        why=why,
        hint="Check the address (port 8265 by default) and that the head runs with its dashboard, or use IP:PORT.",
    )


def _token() -> str:
    """The token, from where Ray itself would take it."""
    direct = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if direct:
        return direct
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    try:
        return Path(named or Path.home() / ".ray" / "auth_token").read_text().strip()
    except OSError:
        return ""
