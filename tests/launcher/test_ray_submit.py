"""The cluster's side of a submission, with the cluster faked: agents begin before the controller does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.paths import RunPaths
from launcher import ray_backend, ray_submit
from launcher.backend import AgentAddress
from launcher.host import announce
from launcher.lock import ControllerLock
from launcher.store import RunStore
from strategies.errors import StorageError
from tests.support.runs import make_run

WORDS = ["experiment=quickstart", "tracking=none", "cluster.nodes=4", "cluster.spares=1"]


class Agents:
    """A backend whose reservation is placed at the third request."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.starting = 0
        self.announcing: list[AgentAddress] = []
        self.paths = RunPaths("")

    def request_agents(self, count: int) -> None:
        self.calls.append(f"request {count}")
        self.starting = count if len(self.calls) > 2 else 0

    def complaint(self) -> str:
        """Each time that it is asked one more agent announces itself; when all have, the next one has died."""
        if not self.announcing:
            return "it died"
        announce.write(self.paths, self.announcing.pop())
        return ""

    def release(self) -> None:
        self.calls.append("release")


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    made = Agents()

    def backend(run_dir: Path, cluster: object, **options: Any) -> Agents:
        made.paths = RunPaths(run_dir)
        return made

    monkeypatch.setattr(ray_backend, "RayBackend", backend)
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunStore:
    return make_run(tmp_path, words=WORDS)


def test_agents_are_started_ahead_and_stay(run: RunStore, agents: Agents) -> None:
    with ray_submit._agents_ahead(run.paths.root):
        assert agents.calls == ["request 5"] * 3
    assert "release" not in agents.calls


def test_only_nodes_that_have_not_announced_themselves_are_asked_whether_they_share_the_run_directory(
    run: RunStore, agents: Agents, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def everywhere(probe: object, *, timeout_s: float, besides: object) -> dict[str, str]:
        asked.append(besides)
        return {"10.0.0.9": "it does not exist"}

    monkeypatch.setattr(ray_backend, "run_everywhere", everywhere)
    agents.announcing = [
        AgentAddress(node=node, host="10.0.0.1", port=1, pid=1, slots=1, incarnation="x") for node in ("n1", "n2")
    ]
    refused = pytest.raises(StorageError, match=r"not shared with the node 10\.0\.0\.9")
    with refused, ray_submit._agents_ahead(run.paths.root) as proven:
        ray_submit.check_shared(run.paths.root, "nonce", besides=proven)
    assert asked == [{"n1", "n2"}]
    assert agents.calls[-1] == "release"


def test_they_are_given_back_when_nothing_comes_of_it(run: RunStore, agents: Agents) -> None:
    with pytest.raises(StorageError), ray_submit._agents_ahead(run.paths.root):
        raise StorageError("The run directory is not shared.")
    assert agents.calls[-1] == "release"


def test_they_are_the_controllers_once_there_is_one(run: RunStore, agents: Agents) -> None:
    ahead = ray_submit._agents_ahead(run.paths.root)
    ahead.__enter__()
    ControllerLock.acquire(run.paths)
    assert not ahead.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "release" not in agents.calls


def test_who_follows_another_controller_finds_what_it_finds(run: RunStore, agents: Agents) -> None:
    ControllerLock.acquire(run.paths).release()
    with ray_submit._agents_ahead(run.paths.root):
        pass
    assert agents.calls == []
