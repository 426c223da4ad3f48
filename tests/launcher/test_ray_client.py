"""What does not need a cluster: answers of other processes, the size of a cluster, where the token comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.paths import RunPaths
from launcher import ray_client, ray_jobs
from launcher.backend import NodeInfo
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
    assert ray_client.auth_environment() == {"RAY_AUTH_MODE": "disabled"}
    assert ray_client.auth_environment("/t") == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t"}
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("from the file\n")
    assert ray_client.auth_environment() == {"RAY_AUTH_MODE": "token"}
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
        ray_client.answer_in("{}\n3\n", "first\nlast words\n\n", what="It did not answer.")
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
    monkeypatch.setattr(ray_client, "describe", lambda address: nodes)
    assert ray_client.measure("a:1") == measured


def test_a_cluster_without_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_client, "describe", lambda address: [])
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
