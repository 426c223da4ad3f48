"""The controller's actor when things fail, without Ray: when it leaves for good, and when it dies to be restarted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.paths import RunPaths
from launcher import ray_actors, ray_order
from launcher.backend import Backend
from launcher.lock import ControllerLock, identity
from launcher.logbook import Fenced
from launcher.ray_actors import ControllerHost
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from launcher.supervise import request_cancel
from strategies.errors import ClusterError, StorageError
from tests.support.fakes import FakeBackend, tiny_request

pytestmark = pytest.mark.timeout(30)


class Site:
    """One actor after another, of one order."""

    def __init__(self, root: Path) -> None:
        self.store = RunStore.create(tiny_request(root))
        self.backend = FakeBackend(["a", "b"])
        self.order, _ = ray_order.place(self.paths, "a:1", resume=None, adopt=True)
        self.slept: list[float] = []
        self.on_sleep: Callable[[], object] = lambda: None
        self.controlled: list[Mapping[str, Any] | None] = []

    @property
    def paths(self) -> RunPaths:
        return self.store.paths

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.on_sleep()

    def actor(self, **more: Any) -> tuple[str, ControllerHost]:
        """How an actor ended (``left`` or ``died``), and the actor."""
        ended: list[str] = []
        over = threading.Event()

        def end(how: str) -> None:
            ended.append(how)
            over.set()

        def connect(store: RunStore) -> Backend:
            return self.backend

        host = ControllerHost(
            str(self.paths.root),
            connect,
            lambda: end("left"),
            order=self.order,
            die=lambda reason: end("died"),
            sleep=self.sleep,
            **more,
        )
        assert over.wait(10.0)
        return ended[0], host


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(ray_actors, "ANSWER_S", 0.0)
    return Site(tmp_path)


def controls(site: Site, monkeypatch: pytest.MonkeyPatch, *outcomes: BaseException | None) -> None:
    """Let the n-th controller end as given, after it has recorded its start as a real one does."""
    left = list(outcomes)

    def control(store: RunStore, backend: Backend, lock: ControllerLock, **more: Any) -> RunState:
        site.controlled.append(more["resume"])
        wish = {"id": more["resume"]["id"]} if more["resume"] else {}
        store.append(EventKind.CONTROLLER_STARTED, epoch=lock.epoch, **identity(), adopted=True, **wish)
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if outcome is not None:
            # The record is that of this very process, which a successor must find dead.
            (store.paths.controllers / f"{lock.epoch}.released").touch()
            raise outcome
        lock.release()
        return RunState.SUCCEEDED

    monkeypatch.setattr(ray_actors, "control", control)


def kinds(site: Site) -> list[EventKind]:
    return [event.kind for event in site.store.events()]


def test_a_controller_that_ends_well_gives_back_and_leaves(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, None)
    ended, host = site.actor()
    assert ended == "left"
    assert host.outcome(0.0) == {"epoch": 1}
    assert site.backend.released == 1
    assert ray_order.fate(site.paths, site.order) is ray_order.Fate.TAKEN


def test_one_that_comes_after_the_client_gave_up_controls_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, None)
    assert ray_order.withdraw(site.paths, site.order)
    ended, host = site.actor()
    assert ended == "left"
    assert site.controlled == []
    assert "given up" in host.outcome(0.0)["what"]  # type: ignore[index]
    assert site.store.run().state is RunState.FAILED
    ControllerLock.acquire(site.paths)  # nobody holds it


@pytest.mark.parametrize("error", [StorageError("disk full"), ClusterError("no answer"), OSError("gone")])
def test_when_storage_or_cluster_fail_it_dies_and_the_next_one_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    controls(site, monkeypatch, error, None)
    assert site.actor()[0] == "died"
    assert site.slept == [2 * ray_actors.RETRY_S]
    assert site.backend.released == 0, "the gang lives on"
    assert site.actor()[0] == "left"
    assert len(site.controlled) == 2
    assert not site.store.run().state.terminal


def test_it_waits_until_the_run_directory_can_be_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, StorageError("disk full"), None)
    answers = iter([False, False, True])
    monkeypatch.setattr(ray_actors, "_writable", lambda paths: next(answers))
    assert site.actor()[0] == "died"
    assert site.slept[1:] == [2.0, 4.0]


def test_it_gives_up_when_nothing_can_be_written_for_long(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, StorageError("disk full"))
    monkeypatch.setattr(ray_actors, "_writable", lambda paths: False)
    assert site.actor()[0] == "left"
    assert ray_actors.STORAGE_PATIENCE_S < sum(site.slept) < 2 * ray_actors.STORAGE_PATIENCE_S
    assert site.backend.released == 1


def test_it_gives_up_when_many_came_to_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, ClusterError("no answer"))
    ends = [site.actor()[0] for _ in range(ray_actors.FRUITLESS_LIMIT)]
    assert ends == ["died"] * (ray_actors.FRUITLESS_LIMIT - 1) + ["left"]
    assert site.slept == sorted(site.slept)
    assert max(site.slept) == ray_actors.RETRY_MAX_S
    run = site.store.run()
    assert (run.state, run.reason) == (RunState.FAILED, "the controller failed: no answer")
    assert site.backend.released == 1


def test_a_bug_ends_the_run_with_its_reason_and_no_reservation(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, KeyError("oops"))
    assert site.actor()[0] == "left"
    run = site.store.run()
    assert run.state is RunState.FAILED
    assert "KeyError: 'oops'" in str(run.reason)
    assert site.backend.released == 1


def test_a_fenced_controller_touches_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, Fenced())
    assert site.actor()[0] == "left"
    assert site.backend.released == 0
    assert kinds(site)[-1] is EventKind.CONTROLLER_STARTED


def test_the_first_of_an_actor_is_refused_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, None)
    ControllerLock.acquire(site.paths)
    ended, host = site.actor()
    assert (ended, site.slept, site.controlled) == ("left", [], [])
    assert host.outcome(0.0)["kind"] == "ResumeRefused"  # type: ignore[index]
    assert ray_order.fate(site.paths, site.order) is ray_order.Fate.OPEN


def test_a_restarted_one_waits_for_the_other_controller_to_go(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, ClusterError("no answer"), None)
    assert site.actor()[0] == "died"
    other = ControllerLock.acquire(site.paths)
    site.slept.clear()

    def third_time() -> None:
        if len(site.slept) == 3:
            other.release()

    site.on_sleep = third_time
    assert site.actor()[0] == "left"
    assert len(site.slept) == 3
    assert len(site.controlled) == 2


def test_a_restarted_one_leaves_when_the_other_controller_stays(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    controls(site, monkeypatch, ClusterError("no answer"), None)
    assert site.actor()[0] == "died"
    ControllerLock.acquire(site.paths)
    site.slept.clear()
    assert site.actor()[0] == "left"
    assert sum(site.slept) == ray_actors.REFUSED_PATIENCE_S
    assert not site.store.run().state.terminal
    assert site.backend.released == 0


def test_a_wish_that_ended_in_adoption_is_obeyed_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted actor neither withdraws a cancel that came later nor resumes a second time."""
    controls(site, monkeypatch, ClusterError("no answer"), None)
    wish = {"id": site.order, "overrides": [], "changes": []}
    request_cancel(site.store, by="an earlier cancel")
    assert site.actor(resume=wish)[0] == "died"
    assert not site.paths.cancel.exists()
    request_cancel(site.store, by="a later cancel")
    assert site.actor(resume=wish)[0] == "left"
    assert site.paths.cancel.exists()
    assert [given and given["id"] for given in site.controlled] == [site.order, None]


def test_signals_are_ours_and_not_rays() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    seen: list[str] = []
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as Ray starts its workers
        ray_actors.on_termination(seen.append)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == ["SIGTERM", "SIGINT"]
