"""The cluster's side of a submission, with the cluster faked: agents begin before the controller does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import ray_backend, ray_submit
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

    def request_agents(self, count: int) -> None:
        self.calls.append(f"request {count}")
        self.starting = count if len(self.calls) > 2 else 0

    def release(self) -> None:
        self.calls.append("release")


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    made = Agents()

    def backend(run_dir: Path, cluster: object, **options: Any) -> Agents:
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
