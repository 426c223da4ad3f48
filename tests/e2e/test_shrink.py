"""Too few nodes are left: the run goes on with a smaller plan, trains the same model, and grows back.

The oracle: the global batch is exact under any plan, so every loss and the final weights agree with those of a run that
nobody disturbed, to fp32 rounding.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.checkpoint import newest
from jobs.checkpoint.reader import Reader
from launcher import build, launch, muster
from launcher.config import compose
from launcher.departure import FOR_MORE as LEFT
from launcher.follow import Screen
from launcher.local_backend import LocalBackend
from launcher.preparation import prepare_data
from launcher.run import EventKind, RunState
from launcher.sizing import plan_of
from launcher.store import RunStore
from strategies.codec import to_json
from tests.support import cli

pytestmark = pytest.mark.timeout(420)
NO_SPARE = ("cluster.spares=0", "recovery.shrink_after_s=0")
STEPS = 120
FAULT = 'faults=["node_kill@node=1,step=10"]'
LONG = ("train.global_batch=32", f"train.steps={STEPS}", "checkpoint.every=4", *NO_SPARE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shrink")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed"), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "undisturbed")


def curve(run: RunStore) -> Any:
    """Loss, gradient norm and rate of every step."""
    steps = cli.curve(run)
    assert sorted(steps) == list(range(1, len(steps) + 1))
    return np.array([steps[step] for step in sorted(steps)])


def weights(run: RunStore) -> dict[str, Any]:
    """The final weights."""
    found = newest(run.paths.checkpoints)
    assert found is not None
    reader = Reader(found)
    return {name: reader.read_flat(name, "master", 0, math.prod(reader.shape(name))) for name in reader.names}


def assert_agrees(run: RunStore, undisturbed: RunStore) -> None:
    """To fp32 rounding."""
    assert run.run().state is RunState.SUCCEEDED
    np.testing.assert_allclose(curve(run), curve(undisturbed), rtol=1e-5)
    ours, theirs = weights(run), weights(undisturbed)
    assert list(ours) == list(theirs)
    for name, values in ours.items():
        if name.endswith("attn.k.bias"):  # softmax does not see it: its gradient is rounding, which Adam makes large
            continue
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


def decisions(run: RunStore) -> list[str]:
    """What the controller decided, in order."""
    return [event.data["action"] for event in run.events() if event.kind is EventKind.DECISION]


PLANS = {
    "tp2_pp2": (cli.TP2_PP2, (2, 1, 1)),
    "tp2_dp2": (("strategy.tp=2", "strategy.pp=1", "strategy.dp=2"), (2, 1, 1)),
    "dp4_zero2": (("strategy.tp=1", "strategy.pp=1", "strategy.dp=4", "strategy.zero_stage=2"), (1, 1, 2)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tp2_pp2" else [pytest.mark.full]) for name in sorted(PLANS)]
)
def test_half_of_the_nodes_do_the_work_of_all(name: str, folder: Path, undisturbed: RunStore) -> None:
    words, shape = PLANS[name]
    faults = 'faults=["node_kill@node=1,step=8"]'
    done = cli.phalanx(*cli.tiny(folder, name, *words, *NO_SPARE, faults), cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, name)
    first, second = run.run().attempts
    smaller = plan_of(second)
    assert smaller is not None
    assert (smaller.tp, smaller.pp, smaller.dp) == shape
    assert (plan_of(first), second.wanted) == (run.request().job.plan, first.plan)
    assert (len(first.nodes), len(second.nodes)) == (2, 1)
    assert second.resume_from.startswith("memory:")
    assert second.first_step in (7, 8)  # the replica of step 7 may have been on its way
    assert decisions(run) == ["restart", "shrink"]
    job = json.loads(run.paths.job(2).read_text())
    assert job["deepspeed"]["gradient_accumulation_steps"] == smaller.grad_accum
    assert smaller.rows_per_step == run.request().job.batch.global_batch
    assert_agrees(run, undisturbed)
    assert "shrinking: 1 of 2 nodes are there" in done.err
    status = cli.phalanx("status", name, "--json", "--dir", str(folder / "runs"), cwd=folder).document
    assert [one["plan"] for one in status["attempts"]] == [to_json(first.plan), to_json(second.plan)]
    books = status["ledger"]
    assert sum(seconds for key, seconds in books.items() if key != "wall") == pytest.approx(books["wall"])
    cli.assert_nothing_left(run.paths.root)


RAMP = ("train.ramp={start: 2, increment: 2, samples: 48}", "train.global_batch=8", "strategy.tp=1", "strategy.pp=2")
RAMPED = (*RAMP, "strategy.dp=2", "train.steps=18")
SIZES = [2] * 8 + [4] * 4 + [6] * 3 + [8] * 3


def batches(run: RunStore) -> list[int]:
    """Sequences that every step was made of, as its speed says."""
    seq = run.request().job.batch.seq
    found = {int(line["step"]): round(line["tokens_per_s"] * line["seconds"] / seq) for line in run.metrics()}
    return [found[step] for step in sorted(found)]


def position(run: RunStore) -> Any:
    """Where the run has come to in its samples: what its last checkpoint says."""
    found = newest(run.paths.checkpoints)
    assert found is not None
    return Reader(found).manifest.extra["sampler"]


@pytest.mark.full
def test_a_run_whose_batch_grows_shrinks_in_mid_ramp(folder: Path) -> None:
    """Every step before and after has the samples that it has in a run that nobody disturbed."""
    done = cli.phalanx(*cli.tiny(folder, "ramp", *RAMPED), cwd=folder)
    assert done.code == 0, done.err
    faults = 'faults=["node_kill@node=1,step=10"]'
    done = cli.phalanx(*cli.tiny(folder, "ramp-shrunk", *RAMPED, *NO_SPARE, faults), cwd=folder)
    assert done.code == 0, done.err
    whole, run = cli.store(folder, "ramp"), cli.store(folder, "ramp-shrunk")
    assert decisions(run) == ["restart", "shrink"]
    first, second = run.run().attempts
    plans = plan_of(first), plan_of(second)
    assert [(one.pp, one.dp, one.grad_accum) for one in plans if one is not None] == [(2, 2, 4), (2, 1, 8)]
    assert second.first_step in (9, 10), "the batch still grows"
    assert batches(run) == batches(whole) == SIZES
    assert position(run) == position(whole)
    assert_agrees(run, whole)


@pytest.mark.full
def test_the_oracle_sees_one_sample(folder: Path, undisturbed: RunStore) -> None:
    """The comparison above can fail: one sample that is left out is another curve, from its step on."""
    done = cli.phalanx(*cli.tiny(folder, "sample", "train.skips=[{step: 8, samples: 1}]"), cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, "sample")
    np.testing.assert_allclose(curve(run)[:7], curve(undisturbed)[:7], rtol=1e-5)
    with pytest.raises(AssertionError):
        assert_agrees(run, undisturbed)


def nodes_return(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Lost nodes come back when the run has come so far."""
    plain = LocalBackend.request_agents

    def request_agents(backend: LocalBackend, count: int) -> None:
        run = RunStore(backend._paths.root)
        backend._replace_lost = max(cli.curve(run), default=0) >= step
        plain(backend, count)

    monkeypatch.setattr(LocalBackend, "request_agents", request_agents)
    monkeypatch.setattr(muster, "SPARE_EVERY_S", 0.2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def run_here(folder: Path, name: str, *more: str) -> RunStore:
    """A run whose controller is in this process."""
    words = cli.tiny(folder, name, *more)[1:]
    config = build.settle(compose(list(words)), name=name, cwd=folder)
    screen = Screen(io.StringIO())
    request = prepare_data(config, build.build_request(config, words), screen)
    store = launch.create(request, config, None)
    assert launch.run(store, screen).state is RunState.SUCCEEDED
    return store


@pytest.fixture(scope="module")
def undisturbed_long(folder: Path) -> RunStore:
    done = cli.phalanx(*cli.tiny(folder, "undisturbed-long", *LONG), cwd=folder)
    assert done.code == 0, done.err
    return cli.store(folder, "undisturbed-long")


def assert_grown(run: RunStore, every: int = 4) -> None:
    """It has shrunk once and grown once, and only the lost node has cost steps; ``every``: steps between saves."""
    state = run.run()
    assert [one for one in decisions(run) if one != "adopt"] == ["restart", "shrink", "grow"]
    assert [attempt.reason for attempt in state.attempts] == ["start", "restart", "grow"]
    assert [attempt.plan for attempt in state.attempts][::2] == [to_json(run.request().job.plan)] * 2
    left, grown = state.attempts[1:]
    assert left.wanted == grown.plan
    assert left.cause == LEFT
    assert grown.first_step == left.last_step + 1
    assert not every or grown.first_step % every == 1
    assert state.restarts == 1
    assert state.steps_lost <= 1  # step 9, if the replica of it was still on its way
    assert len(list(run.metrics())) == STEPS + state.steps_lost


@pytest.mark.full  # three minutes; tests/launcher/test_sizing.py grows one by hand
@pytest.mark.parametrize("every", [4, 0])
def test_grows_back_when_the_node_returns(
    every: int, folder: Path, undisturbed_long: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no checkpoint on disk before the last step every copy in memory is one to leave at."""
    nodes_return(monkeypatch, step=14)
    run = run_here(folder, f"grown-{every}", *LONG, f"checkpoint.every={every}", FAULT)
    assert_grown(run, every)
    if not every:  # nobody has waited for a disk
        grown = run.run().attempts[-1]
        assert grown.resume_from.startswith("memory:")
        committed = [e.data["step"] for e in run.events() if e.kind is EventKind.CHECKPOINT_COMMITTED]
        assert committed == [STEPS]
    assert_agrees(run, undisturbed_long)
    cli.assert_nothing_left(run.paths.root)


@pytest.mark.full  # a minute; tests/launcher/test_sizing.py adopts one by hand
def test_a_smaller_gang_is_adopted_and_then_grows(folder: Path, undisturbed_long: RunStore) -> None:
    """To the next controller of plain processes the lost node is new again."""
    process = cli.start(*cli.tiny(folder, "adopted", *LONG, FAULT), cwd=folder)
    root = folder / "runs" / "adopted"

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        return (root / "request.json").exists() and max(cli.curve(RunStore(root)), default=0) >= 14

    cli.wait_for(reached, "step 14, on one node")
    process.kill()
    cli.end(process)
    resumed = cli.phalanx("resume", "adopted", "--dir", str(folder / "runs"), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    run = cli.store(folder, "adopted")
    begun = [event.data["adopted"] for event in run.events() if event.kind is EventKind.CONTROLLER_STARTED]
    assert begun == [False, True]
    assert decisions(run).count("adopt") == 1
    assert_grown(run)
    assert_agrees(run, undisturbed_long)
    cli.assert_nothing_left(root)
