"""Filling a run directory, what is redacted, signals, and the verdict at the end."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from jobs import disks
from jobs.spec import CheckpointSpec
from launcher import backends, build, finish, launch, supervise
from launcher.config import compose, recompose
from launcher.describe import describe
from launcher.follow import Screen
from launcher.host.agent import AgentOptions
from launcher.proof import unproven
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from strategies.errors import ClusterError, ConfigError, PhalanxError, StorageError
from tests.support.direct_io import require_direct_io
from tests.support.fakes import tiny_request
from tests.support.runs import T0, configuration, failed_run, make_run, recovered_run


def test_run_directory_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "s3cret")
    config = configuration(tmp_path, "demo", ["job=script", "job.command=x", "tracking=none"])
    config = replace(config, job=replace(config.job, workdir=str(tmp_path / "project")))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text("")
    request = build.build_request(config, ["train.lr=1e-3", "x: [y"])
    store = launch.create(request, config, launch.project(config))
    assert recompose(store.paths.config, []) == config
    assert store.paths.overrides.read_text() == '- "train.lr=1e-3"\n- "x: [y"\n'
    assert "s3cret" not in store.paths.env.read_text()
    assert stat.S_IMODE(store.paths.env.stat().st_mode) == 0o600
    assert (store.paths.root / "user" / "train.py").exists()
    assert (store.paths.code / "jobs" / "worker.py").exists()
    with pytest.raises(ConfigError, match="exists"):
        launch.create(request, config, None)
    assert (store.paths.root / "user" / "train.py").exists()


def test_disks_of_this_machine_are_looked_at_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    monkeypatch.setattr(disks, "comes_with_deepspeed", lambda: False)
    request = tiny_request(tmp_path)
    launch.check_disks(request.job.plan, request.cluster)
    plan = replace(request.job.plan, pp=1, offload="optimizer", offload_path=str(tmp_path / "nvme"))
    request = replace(request, job=replace(request.job, plan=plan))
    with pytest.raises(ConfigError, match="async_io"):
        launch.check_disks(request.job.plan, request.cluster)
    launch.check_disks(request.job.plan, replace(request.cluster, kind="existing"))
    disks.op_folder().mkdir(parents=True)
    disks.seal(disks.op_folder()).touch()
    with pytest.raises(StorageError, match="nvme"):
        launch.check_disks(request.job.plan, request.cluster)
    (tmp_path / "nvme").mkdir()
    require_direct_io(tmp_path)
    launch.check_disks(request.job.plan, request.cluster)
    assert not list((tmp_path / "nvme").iterdir())


def test_nothing_is_left_of_a_run_that_could_not_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path) -> None:
        raise StorageError("No space left on device.")

    monkeypatch.setattr(launch, "ship_code", full)
    config = configuration(tmp_path)
    with pytest.raises(StorageError):
        launch.create(build.build_request(config, []), config, None)
    assert not (tmp_path / "demo").exists()


def test_faults_must_be_proven(tmp_path: Path) -> None:
    store = recovered_run(tmp_path)
    records, faults = describe(store, T0)["faults"], store.request().job.faults
    assert unproven(faults, store.events(), records) == []
    assert unproven(faults, store.events(), []) == list(faults)
    unnoticed = [event for event in store.events() if event.kind is not EventKind.FAILURE_DETECTED]
    assert unproven(faults, unnoticed, records) == list(faults)
    late = [record | {"time": T0 + 1000} for record in records]
    assert unproven(faults, store.events(), late) == list(faults)


def test_verdicts(tmp_path: Path) -> None:
    def judged(store: RunStore, state: RunState, **options: Any) -> PhalanxError | None:
        return finish.judge(store, configuration(tmp_path), launch.Outcome(state=state, **options))

    good = recovered_run(tmp_path, "good")
    assert judged(good, RunState.SUCCEEDED) is None
    next(good.paths.faults.glob("*.json")).unlink()
    silent = judged(good, RunState.SUCCEEDED)
    assert silent is not None
    assert silent.exit_code == 100
    bad = judged(failed_run(tmp_path, "bad"), RunState.FAILED)
    assert bad is not None
    assert (bad.exit_code, bad.why) == (100, "all 0 restarts are used")
    cancelled = judged(good, RunState.CANCELLED)
    assert cancelled is not None
    assert cancelled.exit_code == 103
    assert judged(good, RunState.RUNNING, detached=True) is None


def test_summary_goes_to_stdout_and_the_verdict_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = failed_run(tmp_path)
    code = finish.finish(
        store, configuration(tmp_path), launch.Outcome(state=RunState.FAILED), as_json=False, folder=str(tmp_path)
    )
    out, err = capsys.readouterr()
    assert code == 100
    assert f"phalanx resume demo --dir {tmp_path}" in out
    assert err.startswith("error: 'demo' failed.\n  why:  all 0 restarts are used")


@pytest.fixture
def process_run(tmp_path: Path) -> RunStore:
    """A run that has not begun, on plain processes."""
    return make_run(tmp_path, words=["cluster=process", "tracking=none"])


def stub(monkeypatch: pytest.MonkeyPatch, control: Any) -> None:
    @contextlib.contextmanager
    def opened(*unused: Any) -> Iterator[Any]:
        yield supervise.NoCluster()

    monkeypatch.setattr(backends, "opened", opened)
    monkeypatch.setattr(supervise, "control", control)


def run(store: RunStore) -> tuple[launch.Outcome, str]:
    stream = io.StringIO()
    return launch.run(store, Screen(stream)), stream.getvalue()


def test_first_signal_asks_for_a_clean_cancel(process_run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def control(store: RunStore, *unused: Any, **more: Any) -> RunState:
        assert not store.paths.cancel.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        assert "SIGTERM" in store.paths.cancel.read_text()
        return RunState.CANCELLED

    stub(monkeypatch, control)
    before = signal.getsignal(signal.SIGINT)
    outcome, said = run(process_run)
    assert outcome.state is RunState.CANCELLED
    assert "once more to hurry" in said
    assert signal.getsignal(signal.SIGINT) is before


def test_second_signal_hurries_and_the_log_has_an_end(process_run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def control(*unused: Any, **more: Any) -> RunState:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    stub(monkeypatch, control)
    assert run(process_run)[0].state is RunState.CANCELLED
    assert process_run.run().state is RunState.CANCELLED
    assert process_run.run().reason == "interrupted twice"
    assert list(process_run.paths.controllers.glob("*.released"))


def refuse_writes(path: Path, data: bytes) -> bool:
    raise StorageError(f"Cannot write {path}.", why="No space left on device")


def test_signal_on_a_full_disk_still_ends_the_run(process_run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request to cancel cannot be written: the gang is ended from here, and no error escapes from the handler."""

    def control(*unused: Any, **more: Any) -> RunState:
        monkeypatch.setattr(supervise, "create_exclusive", refuse_writes)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")

    stub(monkeypatch, control)
    assert run(process_run)[0].state is RunState.CANCELLED
    assert "No space left on device" in process_run.run().reason


def test_storage_that_fails_under_the_controller_ends_the_run(
    process_run: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def control(*unused: Any, **more: Any) -> RunState:
        raise StorageError("Cannot append.", why="No space left on device")

    stub(monkeypatch, control)
    with pytest.raises(StorageError):
        run(process_run)
    assert process_run.run().state is RunState.FAILED
    assert process_run.run().reason == "Cannot append: No space left on device"


def test_cluster_that_does_not_start_ends_the_run(process_run: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*unused: Any) -> Any:
        raise ClusterError("No nodes.")

    monkeypatch.setattr(backends, "opened", opened)
    with pytest.raises(ClusterError):
        run(process_run)
    assert process_run.run().state is RunState.FAILED
    assert process_run.run().reason == "No nodes."


def test_what_libraries_print_does_not_reach_stdout(
    process_run: RunStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def control(*unused: Any, **more: Any) -> RunState:
        os.write(1, b"noise\n")
        return RunState.SUCCEEDED

    stub(monkeypatch, control)
    run(process_run)
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise" in err


def test_detached_run_is_followed_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["cluster=existing", "cluster.address=h:1", "cluster.nodes=4", "cluster.slots_per_node=2", "tracking=none"]
    store = make_run(tmp_path / "b", words=words)
    story = recovered_run(tmp_path / "a").paths.events.read_bytes().splitlines(keepends=True)[1:]

    def start(given: RunStore, *unused: Any, **more: Any) -> None:
        with given.paths.events.open("ab") as file:
            file.writelines(story)

    monkeypatch.setattr(backends, "start_controller", start)
    outcome, said = run(store)
    assert outcome == launch.Outcome(state=RunState.SUCCEEDED)
    assert "attempt 2 on 4 nodes" in said


def test_leaving_a_detached_run_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["cluster=existing", "cluster.address=h:1", "cluster.nodes=4", "cluster.slots_per_node=2", "tracking=none"]
    store = make_run(tmp_path, words=words)
    monkeypatch.setattr(backends, "start_controller", lambda *unused, **more: None)
    monkeypatch.setattr(launch, "follow", lambda *unused, **more: os.kill(os.getpid(), signal.SIGINT))
    outcome, _ = run(store)
    assert outcome == launch.Outcome(state=RunState.QUEUED, detached=True)
    assert not store.paths.cancel.exists()
    assert finish.judge(store, compose(words), outcome) is None


def test_private_files_stay_private(tmp_path: Path) -> None:
    store = make_run(tmp_path)
    assert stat.S_IMODE(store.paths.secret.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("kind", "url", "warm"),
    [
        ("pretrain", None, None),
        ("evaluate", None, None),
        ("pretrain", "/mnt/checkpoints", None),
        ("pretrain", "s3://bucket/team", "jobs.warm:warm_s3"),
        ("script", None, ""),
    ],
)
def test_ranks_come_out_of_a_pool_that_has_what_they_need(
    kind: Literal["pretrain", "evaluate", "script"], url: str | None, warm: str | None, tmp_path: Path
) -> None:
    request = tiny_request(tmp_path)
    job = replace(request.job, kind=kind, checkpoint=CheckpointSpec(url=url))
    options = backends.agent_options(replace(request, job=job))
    assert options.get("warm") == warm
    assert AgentOptions(**options).warm == (AgentOptions().warm if warm is None else warm)
