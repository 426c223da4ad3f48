"""Real ranks that leave in good order, and a real rank that is slow: on plain processes, as tests/e2e/test_recovery.py.

The oracle is the same: every loss and the final weights equal those of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from launcher.host import announce
from launcher.run import EventKind, RunState
from launcher.store import RunStore
from tests.support import cli

pytestmark = pytest.mark.timeout(420)
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("departure")


def test_a_node_that_is_taken_away_with_notice_costs_nothing(folder: Path) -> None:
    plain = cli.phalanx(*cli.tiny(folder, "plain", f"train.steps={STEPS}"), cwd=folder)
    assert plain.code == 0, plain.err
    undisturbed = cli.store(folder, "plain")
    words = cli.tiny(folder, "noticed", f"train.steps={STEPS}", "checkpoint.every=50", "recovery.max_restarts=0")
    process = cli.start(*words, cwd=folder)
    root = folder / "runs" / "noticed"

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        return (root / "request.json").exists() and max(cli.curve(RunStore(root)), default=0) >= 6

    cli.wait_for(reached, "step 6")
    run = RunStore(root)
    state = run.run()
    assert state.attempt is not None
    agent = announce.read(announce.path_of(run.paths, state.attempt.nodes[1]))
    assert agent is not None
    os.kill(agent.pid, signal.SIGTERM)
    done = cli.end(process)
    assert done.code == 0, done.err
    state = run.run()
    first, second = state.attempts
    assert (state.steps_lost, state.restarts, state.failures) == (0, 0, ())
    assert second.reason == "move"
    assert 6 < second.first_step == first.last_step + 1 < 50  # not where a checkpoint was due
    assert first.nodes[1] not in second.nodes
    decided = [event.data for event in run.events() if event.kind is EventKind.DECISION]
    assert [decision["action"] for decision in decided] == ["leave", "swap"]
    assert state.state is RunState.SUCCEEDED
    assert len(list(run.metrics())) == STEPS  # no step was made twice
    assert cli.curve(run) == cli.curve(undisturbed)
    assert state.weights_digest == undisturbed.run().weights_digest
    cli.assert_nothing_left(root)


@pytest.mark.full  # tests/launcher/test_notice.py has the arithmetic
def test_a_notice_that_is_too_short_moves_the_ranks_at_once(folder: Path) -> None:
    words = cli.tiny(folder, "short", f"train.steps={STEPS}", "checkpoint.every=50", "recovery.max_restarts=0")
    process = cli.start(*words, "recovery.preempt_grace_s=0.5", "checkpoint.memory_every=1", cwd=folder)
    root = folder / "runs" / "short"

    def reached() -> bool:
        assert process.poll() is None, process.communicate()
        return (root / "request.json").exists() and max(cli.curve(RunStore(root)), default=0) >= 10

    cli.wait_for(reached, "step 10")
    run = RunStore(root)
    attempt = run.run().attempt
    assert attempt is not None
    agent = announce.read(announce.path_of(run.paths, attempt.nodes[1]))
    assert agent is not None
    os.kill(agent.pid, signal.SIGTERM)
    done = cli.end(process)
    assert done.code == 0, done.err
    state = run.run()
    assert [one.reason for one in state.attempts] == ["start", "move"]
    assert [fall.kind for fall in state.failures] == ["preempted"]
    assert (state.restarts, state.state) == (0, RunState.SUCCEEDED)
    assert state.steps_lost <= 2  # the newest copy may not be whole yet, and the log says so
    (found,) = [event.data["failure"]["detail"] for event in run.events() if event.kind is EventKind.FAILURE_DETECTED]
    assert "no step can be agreed on and saved in the 0." in found
    assert sorted(cli.curve(run)) == list(range(1, STEPS + 1))
    cli.assert_nothing_left(root)


@pytest.mark.full  # tests/launcher/test_departure.py swaps one by hand
def test_a_rank_of_1_3_is_named_and_its_node_is_swapped(folder: Path) -> None:
    faults = 'faults=["rank_slow@rank=2,step=60"]'
    shape = ("model.layers=4", "model.hidden=256", "model.ffn=1024", "model.seq=64", "train.steps=160")
    words = cli.tiny(folder, "slow", *shape, faults, "checkpoint.every=40", "recovery.replace_stragglers=true")
    done = cli.phalanx(*words, cwd=folder)
    assert done.code == 0, done.err
    run = cli.store(folder, "slow")
    found = [event.data for event in run.events() if event.kind is EventKind.STRAGGLER_FOUND]
    assert [one["failure"]["rank"] for one in found] == [2]
    assert 60 < found[0]["failure"]["step"] <= 80
    assert "(pipe 1, data 0, model 0)" in found[0]["failure"]["detail"]
    state = run.run()
    assert [attempt.reason for attempt in state.attempts] == ["start", "move"]
    assert found[0]["failure"]["node"] not in state.attempts[1].nodes
    assert (state.steps_lost, state.restarts) == (0, 0)
    status = cli.phalanx("status", "slow", "--json", "--dir", str(folder / "runs"), cwd=folder).document
    assert [one["node"] for one in status["excluded"]] == [found[0]["failure"]["node"]]
    assert json.dumps(status["stragglers"])
