"""What does not need a cluster: answers of other processes, the size of a cluster, where the token comes from."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import tempfile
import threading
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher import ray_client, ray_errors, ray_jobs, ray_node, ray_order, ray_process
from launcher.backend import NodeInfo
from launcher.host import process
from launcher.lock import ControllerLock
from strategies.errors import ClusterError, PhalanxError, ResumeRefused, StorageError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing that a developer has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_authentication_mode_is_always_explicit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ray_errors.auth_environment() == {"RAY_AUTH_MODE": "disabled"}
    assert ray_errors.auth_environment("/t") == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t"}
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("from the file\n")
    assert ray_errors.auth_environment() == {"RAY_AUTH_MODE": "token"}
    assert ray_jobs._token() == "from the file"
    (home / "named").write_text("from a path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "named"))
    assert ray_jobs._token() == "from a path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "direct")
    assert ray_jobs._token() == "direct"


@pytest.mark.parametrize(
    "error",
    [StorageError("what", why="why", hint="next"), ResumeRefused("what"), PhalanxError("what", hint="next")],
    ids=lambda error: type(error).__name__,
)
def test_errors_come_back_from_another_process_as_they_were(error: PhalanxError) -> None:
    wire = json.dumps({"phalanx": 1, "error": ray_client.as_remote(error)})
    with pytest.raises(type(error)) as again:
        ray_client.answer_in(f"noise\n{wire}\n\x1b[33mmore noise", what="unused")
    assert type(again.value) is type(error)
    assert str(again.value) == str(error)


def test_a_bug_in_another_process_is_internal() -> None:
    with pytest.raises(PhalanxError, match="ZeroDivisionError: division by zero") as failed:
        ray_client.raise_remote(ray_client.as_remote(ZeroDivisionError("division by zero")))
    assert failed.value.exit_code == 1


def test_no_answer_shows_the_last_words() -> None:
    with pytest.raises(ClusterError) as failed:
        ray_client.answer_in("{}\n3\nfirst\nlast words\n\n", what="It did not answer.")
    assert failed.value.what == "It did not answer."
    assert failed.value.why == "last words"


@pytest.mark.parametrize(
    ("slots", "measured"),
    [([2, 2, 2], (3, 2)), ([8, 8, 1], (2, 8)), ([64, 2, 2], (1, 64)), ([4, 3, 3, 3], (4, 3)), ([1], (1, 1))],
)
def test_the_size_that_makes_most_devices_usable(
    monkeypatch: pytest.MonkeyPatch, slots: list[int], measured: tuple[int, int]
) -> None:
    nodes = [NodeInfo(node=str(n), address="10.0.0.1", slots=have) for n, have in enumerate(slots)]
    monkeypatch.setattr(ray_client, "describe", lambda address, ray: nodes)
    assert ray_client.measure("a:1") == measured


def test_a_cluster_without_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "describe", lambda address, ray: [])
    with pytest.raises(ClusterError, match="no node with a CPU or a GPU"):
        ray_client.measure("a:1")


@pytest.mark.parametrize(
    "address", ["", "nonsense", ":6379", "host:", "host:port", "host:0", "host:70000", "ray://h:1x"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ClusterError, match="is not an address") as failed:
        ray_client.reach(address)
    assert "6379" in failed.value.hint


def test_a_job_tries_every_python_and_notices_a_missing_folder(tmp_path: Path) -> None:
    command = ray_jobs._entrypoint(RunPaths(tmp_path / "it's here"), '{"resume": null}')
    assert command.startswith("test -d '")
    assert f"exit {ray_jobs.NOT_SHARED}" in command
    assert "python3" in command


def test_a_live_controller_is_refused_at_once_and_a_leaving_one_is_waited_for(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    lock = ControllerLock.acquire(paths)
    with pytest.raises(ResumeRefused, match="lives on the cluster"):
        ray_client.wait_gone(lambda: "actor", paths, patience_s=3600.0)
    lock.release()
    answers = iter(["actor", "actor", None])
    ray_client.wait_gone(lambda: next(answers), paths, patience_s=3600.0)
    assert next(answers, "asked until it was gone") == "asked until it was gone"


ASKED = """#!/bin/sh
# Stands in for a process that has a Ray node started and gets no answer: its node is in a session of its own.
trap '' TERM
echo "$PHALANX_VISIT" > "$SEEN"
mkdir "$PHALANX_VISIT/node"
(cd "$PHALANX_VISIT/node" && PHALANX_NODE= setsid sleep 600.25 &)
setsid sleep 600.25 &
touch "$SEEN.up"
sleep 600.25
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["time-out", "Ctrl-C"])
def test_nothing_is_left_of_a_process_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Neither it, nor the node that it had on this machine, nor their folder."""
    script, seen = tmp_path / "asked", tmp_path / "seen"
    script.write_text(ASKED)
    script.chmod(0o755)
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(ray_process, "LET_GO_S", 0.2)
    if how == "Ctrl-C":

        def interrupt() -> None:
            process.wait_until(lambda: (tmp_path / "seen.up").exists(), 20.0)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
    patience = 60.0 if how == "Ctrl-C" else 2.0
    with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else ClusterError):
        ray_client._ask_ray(["submit"], patience, what="It does not answer.")
    assert (tmp_path / "seen.up").exists()
    assert not Path(seen.read_text().strip()).exists()
    assert not [pid for pid in process.all_pids() if process.command_line(pid) == ["sleep", "600.25"]]


def test_a_process_is_listened_to_whatever_the_number_of_its_pipe() -> None:
    """select() takes none above 1023, and a controller of thousands of nodes has as many connections."""
    reader, writer = os.pipe()
    high = fcntl.fcntl(reader, fcntl.F_DUPFD, 1500)
    try:
        assert not ray_process._has_news(high, 0.0)
        os.write(writer, b"x")
        assert ray_process._has_news(high, 0.0)
    finally:
        for fd in (reader, writer, high):
            os.close(fd)


def test_a_node_that_cannot_even_be_started_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.mkdtemp(prefix="phx-")
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **how: made)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no such python"))
    with pytest.raises(FileNotFoundError, match="no such python"), ray_node._temporary_node("10.0.0.1:1", "10.0.0.2"):
        pass
    assert not Path(made).exists()


def fails(*arguments: object, **options: object) -> dict[str, object]:
    raise ClusterError("It does not answer.")


def test_a_client_that_fails_withdraws_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "describe", lambda address: [])
    monkeypatch.setattr(ray_client, "_ask_ray", fails)
    with pytest.raises(ClusterError, match="does not answer"):
        ray_client.start_controller(tmp_path, "10.0.0.1:1")
    (order,) = [path.name for path in (tmp_path / "control" / ray_order.FOLDER).iterdir() if not path.suffix]
    assert not ray_order.take(RunPaths(tmp_path), order)


def test_a_controller_whose_answer_was_lost_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def controls(arguments: list[str], *more: object, **options: object) -> dict[str, object]:
        ControllerLock.acquire(RunPaths(tmp_path))
        assert ray_order.take(RunPaths(tmp_path), json.loads(arguments[2])["nonce"])
        return fails()

    monkeypatch.setattr(ray_client, "describe", lambda address: [])
    monkeypatch.setattr(ray_client, "_ask_ray", controls)
    assert ray_client.start_controller(tmp_path, "10.0.0.1:1") == 1


def test_a_job_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def call(address: str, path: str, body: dict[str, object] | None = None) -> dict[str, object]:
        calls.append(path)
        return {"submission_id": "job", "status": "PENDING"}

    monkeypatch.setattr(ray_jobs, "_call", call)
    with pytest.raises(ClusterError, match="did not end within 0 s"):
        ray_jobs.run_entrypoint("http://a:1", RunPaths(tmp_path), "{}", timeout_s=0.0)
    assert calls == ["/api/jobs/", "/api/jobs/job", "/api/jobs/job/stop"]


def test_the_versions_of_ray_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert ray_errors.RAY in project["optional-dependencies"]["ray"]


def test_a_ray_that_cannot_be_bound_to_this_machine_is_refused() -> None:
    import math

    from launcher import ray_backend

    with pytest.raises(ClusterError, match=f"Ray {metadata.version('ray')} cannot be bound") as failed:
        ray_backend._replace(math, "no_such_function", lambda: None)
    assert "math.no_such_function" in failed.value.why
    assert "ray[default]" in failed.value.hint
