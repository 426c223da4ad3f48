"""Faults on real ranks, and the oracle: every later loss and the final weights equal those of an undisturbed run.

On plain processes (``cluster=process``): same controller, agents, pool and ranks as on Ray, started in a second.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import render
from launcher.account import CLASSES, INCIDENT_CLASSES
from launcher.describe import describe
from launcher.hang import Standing, culprit
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from strategies.codec import from_json
from strategies.errors import PhalanxError
from strategies.topology import Topology
from tests.support import cli

pytestmark = pytest.mark.timeout(420)
BUSY_S = 2.0  # there are more processes than cores: what has happened is read, and written down, when one is free
AT_ONCE_S = BUSY_S
NODE_S = 5.0 + BUSY_S  # recovery.detect_s
UNANSWERED_S = 1.75  # a rank that is stopped cannot say where it stands: so long its answer is waited for


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed"), cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, "undisturbed")
    cli.assert_nothing_left(run.paths.root)
    losses = [loss for loss, _, _ in cli.curve(run).values()]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    return run


def assert_same(run: RunStore, undisturbed: RunStore) -> None:
    """Bit for bit: the losses, norms and rates of every step, and the weights."""
    assert cli.curve(run) == cli.curve(undisturbed)
    cli.assert_forked(run)
    ours, theirs = run.run(), undisturbed.run()
    assert ours.state is RunState.SUCCEEDED
    assert ours.weights_digest is not None
    assert ours.weights_digest == theirs.weights_digest


FAULTS = {
    "rank_kill": ["rank_kill@rank=3,step=8"],
    "rank_exit": ["rank_exit@rank=0,step=5"],
    "rank_error": ["rank_error@rank=2,step=8"],
    "agent_kill": ["agent_kill@node=0,step=8"],
    "node_kill": ["node_kill@node=1,step=8"],
    "during_checkpoint": ["rank_kill@rank=1,step=6,phase=shards_written"],
    "before_the_first_checkpoint": ["rank_kill@rank=1,step=2"],
    "three_in_a_row": ["rank_kill@rank=0,step=4", "node_kill@node=0,step=7", "rank_error@rank=3,step=11"],
}


COVERED = {
    "three_in_a_row",
    "rank_exit",
    "rank_error",
    "agent_kill",
    "node_kill",
    "before_the_first_checkpoint",
    "during_checkpoint",
}  # by the others, or with real Ray nodes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in COVERED else []) for name in sorted(FAULTS)]
)
def test_bit_identical_after_faults(name: str, folder: Path, undisturbed: RunStore) -> None:
    faults = FAULTS[name]
    done = cli.phalanx(*cli.tiny(folder, name, f"faults={json.dumps(faults)}"), cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, name)
    fired = [event.data["record"]["fault"] for event in run.events() if event.kind is EventKind.FAULT_FIRED]
    assert sorted(fired) == sorted(faults)
    assert len(run.run().attempts) == 1 + len(faults)
    assert run.run().steps_lost <= len(faults)
    assert_same(run, undisturbed)
    cli.assert_nothing_left(run.paths.root)
    assert_accounted_for(run, len(faults))
    assert_known_in_time(run, len(faults))


def assert_known_in_time(run: RunStore, failures: int) -> None:
    """A rank that ends is known at once, a node or an agent that dies within ``recovery.detect_s``."""
    found = cli.noticed(run)
    assert len(found) == failures
    for one in found:
        assert one.failed_s == pytest.approx(0, abs=1e-6)  # the injector's own record
        assert 0 < one.known_s <= (NODE_S if one.fault.startswith(("node", "agent")) else AT_ONCE_S), one


def assert_hangs_known_in_time(run: RunStore, failures: int) -> None:
    """Within 3 x the 99th percentile of the run's own steps + 5 s."""
    found, step_s = cli.noticed(run), cli.slow_step_s(run)
    assert len(found) == failures
    for one in found:
        print(f"{one.fault}: known after {one.known_s:.2f} s, steps take {step_s:.2f} s at most")
        assert one.known_s <= 3 * step_s + 5.0 + UNANSWERED_S + BUSY_S, (one, step_s)


def assert_accounted_for(run: RunStore, failures: int) -> None:
    """Every second of the run has a name, and what every failure cost is told; the file of metrics says the same."""
    document = describe(run, time.time())
    books, incidents = document["ledger"], document["incidents"]
    assert sum(books[name] for name in CLASSES) == pytest.approx(books["wall"])
    assert [one["recovered"] for one in incidents] == [True] * failures
    assert sum(one["steps_lost"] for one in incidents) == document["steps_lost"]
    for name in INCIDENT_CLASSES:
        assert sum(one[f"{name}_s"] for one in incidents) == pytest.approx(books[name], abs=1e-6)
    cli.assert_parts_named(run, document)
    assert document["measured"]["restart_s"] > 0
    assert document["predicted"]["step_s"] > 0
    stalls = document["stalls"]
    assert stalls["memory_s"] > 0, "every step was copied into memory"
    assert stalls["memory_s"] + stalls["disk_s"] == pytest.approx(books["checkpoint_stall"])
    told = run.paths.exposition.read_text()
    assert f'phalanx_run_state{{run="{run.name}",state="succeeded"}} 1' in told
    assert sum(float(line.split()[-1]) for line in told.splitlines() if line.startswith("phalanx_restarts")) == failures
    assert 'phalanx_stall_seconds{run="' + run.name + '",tier="memory"}' in told
    print(render.run_text(document))


def test_node_lost_takes_the_spare(folder: Path, undisturbed: RunStore) -> None:
    done = cli.phalanx(*cli.tiny(folder, "spare", 'faults=["node_kill@node=0,step=5"]'), cwd=folder)
    assert done.code == 0, done.err
    first, second = cli.store(folder, "spare").run().attempts
    assert len(set(first.nodes) | set(second.nodes)) == 3
    assert first.nodes[1] == second.nodes[1]
    assert "was lost" in str(first.cause)
    assert second.resume_from.startswith("memory:")
    assert second.first_step >= 4
    assert cli.store(folder, "spare").run().steps_lost <= 1
    assert_same(cli.store(folder, "spare"), undisturbed)
    assert_known_in_time(cli.store(folder, "spare"), 1)


EXPERTS = (
    "model.moe={experts: 4, top_k: 2, ffn: 32, balance_weight: 0.01}",
    *("strategy.tp=1", "strategy.pp=2", "strategy.dp=2", "strategy.ep=2"),
)


@pytest.mark.full
def test_experts_that_went_with_their_node_come_back_from_memory(folder: Path) -> None:
    """Each rank has experts that no other has, and their moments; with the node half of them are gone."""
    done = cli.phalanx(*cli.tiny(folder, "experts", *EXPERTS), cwd=folder)
    assert done.code == 0, done.err
    fault = 'faults=["node_kill@node=1,step=8"]'
    killed = cli.phalanx(*cli.tiny(folder, "experts-killed", *EXPERTS, fault), cwd=folder)
    assert killed.code == 0, killed.err
    run = cli.store(folder, "experts-killed")
    first, second = run.run().attempts
    assert run.request().job.plan.ep == 2
    assert first.nodes[1] not in second.nodes
    assert second.resume_from.startswith("memory:")
    assert run.run().steps_lost <= 1
    assert_same(run, cli.store(folder, "experts"))
    assert_known_in_time(run, 1)
    cli.assert_nothing_left(run.paths.root)


@pytest.mark.full
def test_a_node_whose_device_is_gone_is_left_and_the_spare_takes_its_place(folder: Path, undisturbed: RunStore) -> None:
    """The node itself is well: what it holds in memory is still of use."""
    done = cli.phalanx(*cli.tiny(folder, "device", 'faults=["device_lost@rank=2,step=5"]'), cwd=folder)
    assert done.code == 0, done.err
    store = cli.store(folder, "device")
    run = store.run()
    first, second = run.attempts
    assert (first.failure, second.nodes[0]) == ("device_lost", first.nodes[0])
    assert second.nodes[1] not in first.nodes
    assert set(run.excluded) == {first.nodes[1]}
    assert second.resume_from.startswith("memory:")
    decided = [event.data["action"] for event in store.events() if event.kind is EventKind.DECISION]
    assert decided == ["restart", "swap"]
    assert run.steps_lost <= 1
    assert_same(store, undisturbed)


def test_same_traceback_at_the_same_step_stops(folder: Path, undisturbed: RunStore) -> None:
    faults = ["rank_error@rank=1,step=5", "rank_error@rank=1,step=5,phase=step_begin"]
    done = cli.phalanx(*cli.tiny(folder, "deterministic", f"faults={json.dumps(faults)}"), cwd=folder)
    assert done.code == 100, done.err
    run = cli.store(folder, "deterministic").run()
    assert run.state is RunState.FAILED
    assert "same error at the same step" in run.reason
    assert "Traceback" not in done.err
    cli.assert_nothing_left(folder / "runs" / "deterministic")


@pytest.mark.full
def test_budget_then_resume_renews_it(folder: Path, undisturbed: RunStore) -> None:
    faults = ["rank_kill@rank=0,step=5", "rank_kill@rank=1,step=6"]
    words = cli.tiny(folder, "budget", f"faults={json.dumps(faults)}", "recovery.max_restarts=1")
    done = cli.phalanx(*words, cwd=folder)
    assert done.code == 100, done.err
    assert "recovery.max_restarts" in done.err
    resumed = cli.phalanx("resume", "budget", "--dir", str(folder / "runs"), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    assert_same(cli.store(folder, "budget"), undisturbed)


def started(folder: Path, name: str, step: int) -> tuple[subprocess.Popen[str], RunStore]:
    """A run in the background that has reached ``step``; it is slowed down by nothing, so many steps remain."""
    process = cli.start(*cli.tiny(folder, name, "train.steps=60", "recovery.lease_s=20"), cwd=folder)
    root = folder / "runs" / name

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        return (root / "request.json").exists() and max(cli.curve(RunStore(root)), default=0) >= step

    cli.wait_for(reached, f"step {step} of {name}")
    return process, RunStore(root)


@pytest.fixture(scope="module")
def undisturbed_60(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed60", "train.steps=60"), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "undisturbed60")


def test_live_gang_is_adopted_after_kill_9_of_its_controller(folder: Path, undisturbed_60: RunStore) -> None:
    process, run = started(folder, "adopted", 4)
    process.kill()
    cli.end(process)
    resumed = cli.phalanx("resume", "adopted", "--dir", str(folder / "runs"), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    started_events = [e for e in run.events() if e.kind is EventKind.CONTROLLER_STARTED]
    assert [event.data["adopted"] for event in started_events] == [False, True]
    state = run.run()
    assert (len(state.attempts), state.steps_lost, state.epoch) == (1, 0, 2)
    assert_same(run, undisturbed_60)
    cli.assert_nothing_left(run.paths.root)


def test_second_controller_is_refused(folder: Path) -> None:
    process, run = started(folder, "taken", 2)
    try:
        before = [path.stat().st_mtime_ns for path in (run.paths.request, run.paths.config)]
        second = cli.phalanx("resume", "taken", "--dir", str(folder / "runs"), "--yes", cwd=folder)
        assert second.code == 6, second.err
        assert "Traceback" not in second.err
        assert [path.stat().st_mtime_ns for path in (run.paths.request, run.paths.config)] == before
    finally:
        os.kill(process.pid, signal.SIGINT)
        ended = cli.end(process)
    assert ended.code == 103, ended.err
    assert run.run().state is RunState.CANCELLED
    cli.assert_nothing_left(run.paths.root)


@pytest.mark.full  # tests/e2e/test_main_job.py does it to a whole Ray cluster
def test_everything_gone_then_resume(folder: Path, undisturbed_60: RunStore) -> None:
    process, run = started(folder, "ruins", 8)
    process.kill()
    for pid, _ in cli.processes_of(run.paths.root):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cli.end(process)
    status = cli.phalanx("status", "ruins", "--json", "--dir", str(folder / "runs"), cwd=folder)
    assert status.document["orphaned"] is True
    resumed = cli.phalanx("resume", "ruins", "--dir", str(folder / "runs"), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    assert_same(run, undisturbed_60)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_signal_at_the_client_cancels_cleanly_and_resume_goes_on(
    number: signal.Signals, folder: Path, undisturbed_60: RunStore
) -> None:
    process, run = started(folder, f"signal-{number}", 4)
    os.kill(process.pid, number)
    done = cli.end(process)
    assert done.code == 103, done.err
    assert run.run().state is RunState.CANCELLED
    cli.assert_nothing_left(run.paths.root)
    resumed = cli.phalanx("resume", run.name, "--dir", str(folder / "runs"), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    assert_same(run, undisturbed_60)


def test_orphan_is_cancelled(folder: Path) -> None:
    process, run = started(folder, "orphan", 3)
    process.kill()
    cli.end(process)
    done = cli.phalanx("cancel", "orphan", "--dir", str(folder / "runs"), cwd=folder)
    assert done.code in (0, 103), done.err
    assert run.run().state is RunState.CANCELLED
    cli.assert_nothing_left(run.paths.root)


@pytest.mark.full
def test_orphan_without_anybody_ends_its_lease(folder: Path) -> None:
    """The gang goes on without a controller to its very end, and then frees what it holds."""
    process, run = started(folder, "lease", 3)
    process.kill()
    cli.end(process)
    cli.wait_for(lambda: not cli.processes_of(run.paths.root), "the agents leave after their lease", 180)
    assert max(cli.curve(run)) == 60


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_falls_back_to_the_older(folder: Path, undisturbed: RunStore) -> None:
    """One flipped bit in the newest checkpoint: it is noticed, named, left alone, and the older one is used."""
    words = cli.tiny(folder, "damaged", 'faults=["rank_kill@rank=0,step=8"]', "recovery.max_restarts=0")
    done = cli.phalanx(*words, cwd=folder)
    assert done.code == 100, done.err
    run = cli.store(folder, "damaged")
    shards = sorted((run.paths.checkpoint_dir / "step-00000006").rglob("*.safetensors"))
    assert shards
    flip_a_bit(shards[0])
    resumed = cli.phalanx(
        "resume", "damaged", "recovery.max_restarts=4", "--dir", str(folder / "runs"), "--yes", cwd=folder
    )
    assert resumed.code == 0, resumed.err
    assert [e.kind for e in run.events()].count(EventKind.CHECKPOINT_REJECTED) == 1
    assert run.run().attempts[-1].first_step == 4
    assert_same(run, undisturbed)


def test_the_oracle_sees_one_other_seed(folder: Path, undisturbed: RunStore) -> None:
    """The comparison above can fail: another seed is another run, from the first loss on."""
    done = cli.phalanx(*cli.tiny(folder, "seed", "train.seed=1"), cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, "seed")
    assert cli.curve(run)[1] != cli.curve(undisturbed)[1]
    with pytest.raises((AssertionError, PhalanxError)):
        assert_same(run, undisturbed)


HANGS = [
    "rank_deadlock@rank=3,step=9",
    pytest.param("rank_stop@rank=2,step=9", marks=pytest.mark.full),
    pytest.param("rank_spin@rank=1,step=9,phase=step_end", marks=pytest.mark.full),
]


@pytest.mark.parametrize("fault", HANGS)
def test_the_rank_that_hangs_is_named(fault: str, folder: Path, undisturbed: RunStore) -> None:
    """The gang stands still; the record says who held it up, and every rank's stack is kept."""
    rank, name = int(fault.partition("rank=")[2].partition(",")[0]), fault.partition("@")[0]
    done = cli.phalanx(*cli.tiny(folder, name, f"faults={json.dumps([fault])}"), cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, name)
    (detected,) = [event for event in run.events() if event.kind is EventKind.FAILURE_DETECTED]
    failure = detected.data["failure"]
    assert (failure["kind"], failure["rank"]) == ("hang", rank)
    standings = json.loads(run.paths.hang(1).read_text())["ranks"]
    assert len(standings) == 4
    answering = [other for other in range(4) if (name, other) != ("rank_stop", rank)]  # who is stopped says nothing
    assert all("jobs/stages/pretrain.py" in standings[str(other)]["stack"] for other in answering)
    assert run.run().steps_lost <= 1
    assert_judged_by_what_was_entered(standings, rank, waits=name == "rank_deadlock")
    assert_hangs_known_in_time(run, 1)
    assert_same(run, undisturbed)
    cli.assert_nothing_left(run.paths.root)


def assert_judged_by_what_was_entered(found: dict[str, Any], rank: int, *, waits: bool) -> None:
    """No stack is needed to know the culprit; one that is deadlocked waits in a collective like all others."""
    standings = {int(other): from_json(Standing, at) for other, at in found.items()}
    assert culprit({other: replace(at, stack="?") for other, at in standings.items()})[0] == rank
    progress = standings[rank].progress
    assert progress is not None
    assert bool(progress.waits) == waits
    assert not any("jobs/fault" in file for at in standings.values() for file, _ in at.frames)


PLANS = {"tp2 pp2": (), "dp2 pp2": ("strategy.tp=1",), "tp2 dp2": ("strategy.pp=1",)}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("plan", PLANS)
def test_of_twenty_hangs_every_culprit_is_named(plan: str, folder: Path) -> None:
    """Stopped, holding the lock and deadlocked, on every rank; each gang makes steps enough to know its pace."""
    kinds = ("rank_stop", "rank_spin", "rank_deadlock")
    ranks = [(number + number // 4) % 4 for number in range(20)]
    faults = [f"{kinds[number % 3]}@rank={rank},step={8 * (number + 1)}" for number, rank in enumerate(ranks)]
    budgets = ("recovery.exclude_after=null", "recovery.max_restarts=20", "recovery.budgets.hang=20")
    words = ("train.steps=168", "checkpoint.every=24", *budgets, *PLANS[plan], f"faults={json.dumps(faults)}")
    name = f"twenty-{plan.replace(' ', '-')}"
    done = cli.end(cli.start(*cli.tiny(folder, name, *words), cwd=folder), timeout_s=1100)
    assert done.code == 0, done.err
    run = cli.store(folder, name)
    found = [event.data["failure"] for event in run.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert [(one["kind"], one["rank"]) for one in found] == [("hang", rank) for rank in ranks]
    topology = Topology(run.request().job.plan)
    for one, at in zip(found, map(topology.coordinates, ranks), strict=True):
        assert f"(pipe {at.pipe}, data {at.data}, model {at.model})" in one["detail"]
    assert run.run().steps_lost <= 20
    assert_hangs_known_in_time(run, 20)
