"""A resume changes nothing of the run before control of it is won."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import backends, launch, proposal, resume_plan, supervise
from launcher.cli import main
from launcher.follow import Screen
from launcher.lock import ControllerLock
from launcher.request import LaunchRequest
from launcher.ship import survey
from launcher.store import RunStore
from strategies.errors import ClusterError, PhalanxError, ResumeRefused, StorageError
from tests.support.runs import failed_run, make_run

THERE = ["cluster=existing", "cluster.address=h:1", "cluster.nodes=4", "cluster.slots_per_node=2", "tracking=none"]


def content(root: Path) -> dict[str, bytes]:
    """Every file of a run directory but the lock records."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.parent.name != "controllers"}


def other(request: LaunchRequest) -> LaunchRequest:
    return replace(request, job=replace(request.job, train=replace(request.job.train, lr=0.5)))


def test_a_proposal_changes_the_run_only_when_it_is_promoted(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    before, request = content(store.paths.root), other(store.request())
    name = proposal.propose(store, request, config=b"config", overrides=b"words")
    now = content(store.paths.root)
    assert {name: now[name] for name in before} == before
    assert proposal.load(store, name) == request
    proposal.promote(store, name)
    assert store.request() == request
    assert (store.paths.config.read_bytes(), store.paths.overrides.read_bytes()) == (b"config", b"words")
    assert not list((store.paths.control / "proposals").iterdir())
    proposal.promote(store, name)  # a controller that was restarted in between
    assert store.request() == request
    with pytest.raises(StorageError):
        proposal.promote(store, "0" * 64)


def test_the_request_is_replaced_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(tmp_path)
    before = store.request()
    name = proposal.propose(store, other(before), config=b"config", overrides=b"words")

    def full(path: Path, data: bytes, **unused: object) -> None:
        raise StorageError("full")

    with monkeypatch.context() as patched:
        patched.setattr(proposal, "write_atomic", full)
        with pytest.raises(StorageError, match="full"):
            proposal.promote(store, name)
    assert store.request() == before
    proposal.promote(store, name)
    assert store.request() == other(before)


def test_what_a_killed_client_has_left_is_swept_by_the_next_that_wins(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    request = other(store.request())
    left, rival, winner = (proposal.propose(store, request, config=b"c", overrides=b"w") for _ in range(3))
    folder = store.paths.control / "proposals"
    long_ago = (folder / winner).stat().st_mtime - 2 * 86400
    os.utime(folder / left, (long_ago, long_ago))
    proposal.promote(store, winner)
    assert [one.name for one in folder.iterdir()] == [rival]


def test_a_changed_project_comes_with_the_proposal(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text("new")
    words = ["job=script", "job.command=x", f"job.workdir={tmp_path / 'project'}", "tracking=none"]
    store = make_run(tmp_path / "runs", words=words)
    request = store.request()
    request = replace(request, job=replace(request.job, workdir=str(store.paths.root / "user-2")))
    shipment = survey(tmp_path / "project", limit_mb=1)
    name = proposal.propose(store, request, config=b"", overrides=b"", shipment=shipment)
    assert not (store.paths.root / "user-2").exists()
    proposal.promote(store, name)
    assert (store.paths.root / "user-2" / "train.py").read_text() == "new"


def test_accepting_withdraws_an_earlier_cancel(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    supervise.request_cancel(store, by="test")
    assert proposal.accept(store, None) is None
    assert store.paths.cancel.exists()
    assert proposal.accept(store, {"id": "x", "changes": []}) == {"id": "x", "changes": []}
    assert not store.paths.cancel.exists()


@pytest.mark.parametrize("words", [["train.lr=0.5"], []])
def test_a_refused_resume_has_changed_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else wins control after we looked and before we asked for it."""
    store = failed_run(tmp_path)
    supervise.request_cancel(store, by="test")
    before = content(store.paths.root)
    monkeypatch.setattr(resume_plan, "controlled", lambda paths: False)
    lock = ControllerLock.acquire(store.paths)
    with pytest.raises(SystemExit) as ended:
        main(["resume", "demo", *words, "--yes", "--dir", str(tmp_path)])
    lock.release()
    assert ended.value.code == 6
    assert "live controller" in capsys.readouterr().err
    assert content(store.paths.root) == before


def test_a_refused_resume_elsewhere_has_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(tmp_path, words=THERE)
    supervise.request_cancel(store, by="test")
    name = proposal.propose(store, other(store.request()), config=b"", overrides=b"")
    seen: list[RunStore] = []

    def refused(given: RunStore, *unused: object, **more: object) -> None:
        seen.append(given)
        raise ResumeRefused("taken")

    monkeypatch.setattr(backends, "start_controller", refused)
    monkeypatch.setattr(launch, "renew_code", lambda path: False)
    before = {name: data for name, data in content(store.paths.root).items() if "proposals" not in name}
    with pytest.raises(ResumeRefused):
        launch.run(store, Screen(io.StringIO()), resume={"request": name})
    assert seen
    assert content(store.paths.root) == before


@pytest.mark.parametrize("error", [ResumeRefused, ClusterError])
def test_of_two_equal_resumes_the_one_that_fails_takes_nothing_from_the_other(
    error: type[PhalanxError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The controller of the first is still to come when the second is refused, or has lost its patience."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text("new")
    words = [*THERE, "job=script", "job.command=x", f"job.workdir={tmp_path / 'project'}"]
    store = make_run(tmp_path / "runs", words=words)
    request = store.request()
    request = replace(request, job=replace(request.job, workdir=str(store.paths.root / "user-2")))
    shipment = survey(tmp_path / "project", limit_mb=1)
    first, second = (
        proposal.propose(store, request, config=b"config", overrides=b"words", shipment=shipment) for _ in range(2)
    )

    def refused(*unused: object, **more: object) -> None:
        raise error("not now")

    monkeypatch.setattr(backends, "start_controller", refused)
    with pytest.raises(error):
        launch.run(store, Screen(io.StringIO()), resume={"request": second})
    assert [path.name for path in (store.paths.control / "proposals").iterdir()] == [first]
    proposal.accept(store, {"request": first})
    assert store.request() == request
    assert (store.paths.root / "user-2" / "train.py").read_text() == "new"
    assert not list((store.paths.control / "proposals").iterdir())
