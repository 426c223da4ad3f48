"""``submit --rehearse`` as a person runs it: Ray on this machine, a node that dies, the verdict, and nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.drill.toy import STEPS
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.support import cli

pytestmark = pytest.mark.timeout(420)


def rehearse(folder: Path, *words: str, timeout_s: float = cli.PATIENCE_S) -> cli.Result:
    process = cli.start("submit", "--rehearse", "--json", f"run.dir={folder / 'runs'}", *words, cwd=folder)
    done = cli.end(process, timeout_s)
    assert "Traceback" not in done.err
    return done


def run_of(folder: Path) -> RunStore:
    (name,) = RunStore.names(folder / "runs")
    cli.assert_nothing_left(folder / "runs" / name)
    return RunStore.open(folder / "runs" / name)


def passed(folder: Path, experiment: str, timeout_s: float = cli.PATIENCE_S) -> RunStore:
    """Rehearse an experiment; its node dies, and at most a step is lost."""
    done = rehearse(folder, f"experiment={experiment}", timeout_s=timeout_s)
    assert done.code == 0, done.err
    run, found = run_of(folder), done.document["rehearsal"]
    assert run.run().state is RunState.SUCCEEDED
    assert run.run().step == STEPS
    assert [event.kind for event in run.events()].count(EventKind.FAULT_FIRED) == 1
    assert len(run.run().attempts) == 2
    (proof,) = found["proofs"]
    assert found["passed"]
    assert proof["fault"] == found["faults"][0]
    assert (run.paths.root / proof["file"]).exists()
    assert proof["steps_lost"] <= 1
    assert proof["recovered_s"] > 0
    assert f"rehearsal of {experiment}: TP2 x PP2 x DP2" in done.err
    assert {one["key"] for one in found["changes"]} > {"strategy.tp", "strategy.pp", "strategy.dp", "model.hidden"}
    assert run.request().job.plan.world_size == 8
    return run


def test_gpt3(tmp_path: Path) -> None:
    passed(tmp_path, "gpt3_175b")


@pytest.mark.full  # two minutes and more: eight ranks trade tokens in the 12 micro-batches of a step
@pytest.mark.timeout(900)
def test_gpt4(tmp_path: Path) -> None:
    """A mixture of experts through launcher, controller and fault: in shares, in its schedule, its batch growing."""
    run = passed(tmp_path, "gpt4_1800b", timeout_s=800)
    job = run.request().job
    assert (job.plan.ep, job.plan.schedule, job.plan.zero_stage) == (2, "dualpipev", 1)
    assert job.plan.sequence_parallel
    assert job.model.moe is not None
    assert (job.model.moe.experts, job.model.moe.top_k) == (16, 2)
    assert job.batch.ramp is not None
    lines = list(run.metrics())
    assert {line["attempt"] for line in lines} == {1, 2}
    assert {line["step"] for line in lines} == set(range(1, STEPS + 1))
    for line in lines:
        routing = line["moe"]
        visits = job.schedule().batch_at(line["step"]) * job.model.seq * job.model.moe.top_k * job.model.layers
        assert sum(routing["load"]) == visits
        assert routing["aux_loss"] > 0
        assert 0 < routing["crossed"] < visits
    cli.assert_nothing_left(run.paths.root)


@pytest.mark.full
def test_llama3(tmp_path: Path) -> None:
    passed(tmp_path, "llama3_405b")


@pytest.mark.full
def test_a_fault_that_does_not_fire_fails_the_rehearsal(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "experiment=gpt3_175b", 'faults=["rank_kill@rank=0,phase=restore"]')
    assert done.code == 100, done.err
    assert "rank_kill@rank=0,phase=restore" in done.err
    assert not done.document["rehearsal"]["passed"]
    assert run_of(tmp_path).run().state is RunState.SUCCEEDED
