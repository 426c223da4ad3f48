"""Numbers that go wrong on real ranks: back to before it, without the samples that did it, and nothing else changes.

The oracle is a run whose schedule had that skip from the beginning: every loss and the final weights are equal to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.checkpoint import list_checkpoints
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.e2e.test_recovery import assert_same
from tests.support import cli

pytestmark = pytest.mark.timeout(420)
LONG = ("train.steps=24", "checkpoint.every=5")
Submit = Callable[..., RunStore]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blow-up")


@pytest.fixture(scope="module")
def submit(folder: Path) -> Submit:
    def run(name: str, *words: str, faults: tuple[str, ...] = (), code: int = 0) -> RunStore:
        done = cli.phalanx(*cli.tiny(folder, name, f"faults={json.dumps(list(faults))}", *words), cwd=folder)
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        cli.assert_nothing_left(folder / "runs" / name)
        return cli.store(folder, name)

    return run


@pytest.fixture(scope="module")
def without_eight(submit: Submit) -> RunStore:
    return submit("without-eight", "train.skips=[{step:8,samples:8}]")


def test_nan_on_one_rank(folder: Path, submit: Submit, without_eight: RunStore) -> None:
    run = submit("nan", faults=("nan_grad@rank=1,step=8",))
    (detected,) = [event.data for event in run.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert (detected["failure"]["kind"], detected["failure"]["step"], detected["last_step"]) == ("numeric", 8, 7)
    assert [event.kind for event in run.events()].count(EventKind.FAULT_FIRED) == 1
    assert [attempt.first_step for attempt in run.run().attempts] == [1, 8]  # the copy of step 7 in memory
    assert run.run().steps_lost == 0
    assert_same(run, without_eight)
    status = cli.phalanx("status", "nan", "--json", "--dir", str(folder / "runs"), cwd=folder).document
    assert status["skips"] == [{"step": 8, "samples": 8, "first": 56, "last": 63, "by": "recovery"}]
    told = cli.phalanx("status", "nan", "--dir", str(folder / "runs"), cwd=folder).out
    assert "samples 56 to 63, before step 8 (by recovery)" in told
    newest = list_checkpoints(run.paths.checkpoint_dir)[0]
    assert json.loads(Path(str(newest.path)).read_text())["extra"]["sampler"]["schedule"]["skips"] == [
        {"step": 8, "samples": 8}
    ]


@pytest.mark.full
def test_the_oracle_sees_the_skip(submit: Submit, without_eight: RunStore) -> None:
    """Without the skip the run is another one, from the step of the skip on."""
    whole, skipping = cli.curve(submit("whole")), cli.curve(without_eight)
    assert next(step for step in whole if whole[step] != skipping[step]) == 8


@pytest.mark.full
def test_a_spike_of_the_loss(submit: Submit) -> None:
    oracle = submit("without-twenty", *LONG, "train.skips=[{step:20,samples:8}]")
    run = submit("spike", *LONG, faults=("loss_spike@rank=3,step=20",))
    assert "the loss spiked to" in str(run.run().attempts[0].cause)
    assert [attempt.first_step for attempt in run.run().attempts] == [1, 20]
    assert_same(run, oracle)


@pytest.mark.full
def test_weights_that_an_update_has_wrecked(folder: Path, submit: Submit) -> None:
    """They are kept before anything shows, and gone on from once: the run goes back to what is older."""
    oracle = submit("without-sixteen-on", *LONG, "train.skips=[{step:16,samples:56}]")
    faults = tuple(f"bad_update@rank={rank},step=20" for rank in range(4))  # a sound copy would heal it
    run = submit("wrecked", *LONG, "experiment.require_faults=true", faults=faults)
    assert [event.kind for event in run.events()].count(EventKind.FAULT_FIRED) == 4
    causes = [str(attempt.cause) for attempt in run.run().attempts[:2]]
    assert all("training blew up at step 21: the loss spiked to" in cause for cause in causes)
    assert [attempt.first_step for attempt in run.run().attempts] == [1, 21, 16]
    assert_same(run, oracle)
    status = cli.phalanx("status", "wrecked", "--json", "--dir", str(folder / "runs"), cwd=folder).document
    assert status["skips"] == [{"step": 16, "samples": 56, "first": 120, "last": 175, "by": "recovery"}]
    assert {record["step"] for record in status["faults"]} == {20}


@pytest.mark.full  # a sibling runs by default
def test_from_an_older_state_again_is_given_up_and_a_person_may_go_on(folder: Path, submit: Submit) -> None:
    oracle = submit("without-seven-on", "train.skips=[{step:7,samples:24}]")
    run = submit("again", faults=("nan_grad@rank=1,step=8",) * 3, code=100)
    assert run.run().state is RunState.FAILED
    assert "again with older weights and other samples: it is not the data" in run.run().reason
    assert [attempt.first_step for attempt in run.run().attempts] == [1, 8, 7]
    resumed = cli.phalanx("resume", "again", "--dir", str(folder / "runs"), "--yes", cwd=folder)
    assert resumed.code == 0, resumed.err
    assert_same(run, oracle)
