"""A rehearsal that is submitted: what is shown before, how it is judged afterwards. Run for real in tests/e2e."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from launcher import build
from launcher.config import compose
from launcher.drill.miniature import FAULT, announcement, difference, document, judge, miniature, verdict_text
from launcher.drill.toy import Toy
from strategies.errors import ConfigError, RunFailed
from tests.support.golden import assert_golden

EXPERIMENTS = ("gpt3_175b", "gpt4_1800b", "llama3_405b")


@cache
def of(name: str, *words: str) -> Toy:
    return miniature(compose([f"experiment={name}", *words]))


def faults(toy: Toy) -> tuple[str, ...]:
    return build.resolved_faults(toy.config, build.outline(toy.config))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_shown_before(name: str) -> None:
    toy = of(name)
    assert_golden(f"rehearse-{name}.txt", announcement(toy, faults(toy)))
    found = difference(toy, faults(toy))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["plan"]["tp"] == found["plan"]["pp"] == found["plan"]["dp"] == 2


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_is_a_run_like_any_other(name: str, tmp_path: Path) -> None:
    """Real Ray on this machine, two nodes and one that stands by, and a fault without which it has failed."""
    config = of(name).config
    assert (config.cluster.kind, config.cluster.nodes, config.cluster.slots_per_node) == ("local", 2, 4)
    assert config.cluster.spares == 1
    assert config.experiment.require_faults
    request = build.build_request(build.settle(config, name="run", cwd=tmp_path), ())
    assert request.job.data.path == str(tmp_path / "runs" / ".data" / "rehearsal" / "corpus.txt")
    assert request.job.plan == of(name).plan


def test_the_fault_comes_between_the_first_checkpoint_and_the_end() -> None:
    toy = of("gpt3_175b")
    seeded = [replace(toy, config=replace(toy.config, fault_seed=seed)) for seed in range(12)]
    struck = {faults(one) for one in seeded}
    assert len(struck) > 6
    for (text,) in struck:
        kind, step = text.partition("@")[0], int(text.rpartition("step=")[2])
        assert kind == FAULT.partition("@")[0]
        assert 5 <= step <= 20


def test_faults_of_ones_own() -> None:
    toy = of("gpt3_175b", 'faults=["rank_kill@rank=7,step=4"]')
    assert faults(toy) == ("rank_kill@rank=7,step=4",)
    with pytest.raises(ConfigError, match="20 steps"):
        faults(of("gpt3_175b", 'faults=["rank_kill@rank=7,step=400"]'))


def status(**changes: Any) -> dict[str, Any]:
    seconds = {"detect_s": 0.25, "decide_s": 0.5, "place_s": 0.25, "restore_s": 1.0, "replay_s": 0.5, "wait_s": 0.0}
    incident = {"attempt": 1, "kind": "node_lost", "cause": "node b was lost", "steps_lost": 1, "recovered": True}
    record = {"id": "node_kill.node-1.step-7", "fault": "node_kill@node=1,step=7", "attempt": 1, "step": 7}
    run = {"run": "demo", "state": "succeeded", "step": 20, "steps": 20, "faults": [record]}
    return run | {"incidents": [incident | seconds | changes]}


def test_a_rehearsal_that_passed() -> None:
    toy, run = of("gpt3_175b"), status()
    assert judge(toy, run) is None
    found = document(toy, faults(toy), run, None)
    assert found["passed"]
    assert found["proofs"][0]["recovered_s"] == 2.0
    assert verdict_text(found, run).splitlines() == [
        "rehearsal: passed",
        "  node_kill@node=1,step=7 fired: faults/node_kill.node-1.step-7.json, written before it struck",
        "    noticed after 0.2 s: node b was lost",
        "    the ranks trained again 2.0 s after it; 1 step lost, at most 1 may be",
        "  succeeded at step 20 of 20",
    ]


def test_more_lost_than_the_copies_in_memory_allow_is_a_failure() -> None:
    toy, run = of("gpt3_175b"), status(steps_lost=2)
    wrong = judge(toy, run)
    assert isinstance(wrong, RunFailed)
    assert "has cost 2 steps" in wrong.what
    assert "at most 1" in wrong.why
    assert "rehearsal: FAILED" in verdict_text(document(toy, (), run, wrong), run)
    assert judge(of("gpt3_175b", "checkpoint.memory_every=2"), run) is None
    assert judge(of("gpt3_175b", "checkpoint.memory_every=0"), status(steps_lost=3)) is None


def test_a_fault_that_nobody_noticed_has_no_seconds() -> None:
    toy, run = of("gpt3_175b"), status() | {"incidents": []}
    (proof,) = document(toy, (), run, None)["proofs"]
    assert (proof["noticed_s"], proof["recovered_s"]) == (None, None)
