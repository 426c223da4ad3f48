"""What a resume may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import render
from launcher.build import build_request, settle
from launcher.config import compose
from launcher.request import LaunchRequest
from launcher.resume_diff import compare
from tests.support.golden import assert_golden


def request(parent: Path, *words: str) -> LaunchRequest:
    return build_request(settle(compose(words), name="r", cwd=parent), words)


@pytest.mark.parametrize(
    ("word", "verdict"),
    [
        ("recovery.max_restarts=3", "safe"),
        ("checkpoint.every=2", "safe"),
        ("tracking=none", "safe"),
        ("cluster.spares=2", "safe"),
        ("train.sample_tokens=5", "safe"),
        ("train.spike_sigmas=0", "safe"),
        ("train.skips=[{step: 9, samples: 8}]", "changes the run"),
        ("train.lr=1e-5", "changes the run"),
        ("train.steps=500", "changes the run"),
        ("train.precision=bf16", "changes the run"),
        ("strategy.tp=2", "changes the run"),
        ("strategy.micro_batch=2", "changes the run"),
        ("model.hidden=64", "refused"),
        ("model.vocab=300", "refused"),
        ("train.seed=3", "refused"),
        ("train.global_batch=16", "refused"),
        ("data=text", "refused"),
        ("run.name=other", "refused"),
        ("job=script", "refused"),
    ],
)
def test_verdicts(word: str, verdict: str, tmp_path: Path) -> None:
    extra = {"data=text": ["data.path=x"], "job=script": ["job.command=x"]}.get(word, [])
    changes = compare(request(tmp_path), request(tmp_path, word, *extra), step=0)
    assert changes
    severity = ["safe", "changes the run", "refused"]
    assert max((change.verdict for change in changes), key=severity.index) == verdict
    assert all(change.reason for change in changes)


@pytest.mark.parametrize(("word", "verdict"), [("imbalance=2", "safe"), ("balance_weight=0.5", "refused")])
def test_what_a_run_with_experts_may_change(word: str, verdict: str, tmp_path: Path) -> None:
    words = ("model=moe_tiny", f"model.moe.{word}")
    (change,) = compare(request(tmp_path, words[0]), request(tmp_path, *words), step=0)
    assert (change.field, change.verdict) == (words[1].partition("=")[0], verdict)


def test_nothing_changed(tmp_path: Path) -> None:
    assert compare(request(tmp_path), request(tmp_path), step=10) == []


def test_fewer_steps_than_are_done(tmp_path: Path) -> None:
    changes = compare(request(tmp_path), request(tmp_path, "train.steps=5"), step=10)
    assert [(change.field, change.verdict) for change in changes] == [("train.steps", "refused")]


def test_derived_fields_are_not_listed(tmp_path: Path) -> None:
    changes = compare(request(tmp_path), request(tmp_path, "strategy.dp=4"), step=0)
    assert {change.field for change in changes} == {"plan.dp"}


def test_text(tmp_path: Path) -> None:
    before, after = request(tmp_path), request(tmp_path, "train.lr=1e-5", "checkpoint.every=2", "train.seed=1")
    text = render.resume_text(
        name="demo",
        state="failed",
        attempt=3,
        step=10,
        steps=100,
        sample=80,
        source="/runs/demo/checkpoints/step-00000010/e0001-a0002.manifest.json",
        plan="DP8 -> DP4",
        nodes="4 nodes x 2 slots",
        changes=compare(before, after, step=10),
    )
    assert_golden("resume.txt", text)


@pytest.mark.parametrize(
    ("words", "live", "said"),
    [
        (["recovery.max_restarts=9"], 14, "will be ended for these changes: the 4 steps since the last checkpoint"),
        (["recovery.max_restarts=9"], 10, "will be ended for these changes: no step is lost"),
        ([], 14, "are taken over as they are"),
    ],
)
def test_text_says_what_becomes_of_a_live_gang(tmp_path: Path, words: list[str], live: int, said: str) -> None:
    changes = compare(request(tmp_path), request(tmp_path, *words), step=10)
    common = {"name": "demo", "state": "running, orphaned", "attempt": 2, "step": 10, "steps": 100, "sample": 80}
    more = {"source": "x", "plan": "DP8", "nodes": "4 nodes x 2 slots", "changes": changes}
    assert said in render.resume_text(**common, **more, live=live)  # type: ignore[arg-type]
    assert "still live" not in render.resume_text(**common, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("step", "verdict"), [(8, "changes the run"), (9, "refused")])
def test_what_is_skipped_may_change_for_the_steps_to_come_only(step: int, verdict: str, tmp_path: Path) -> None:
    before, after = request(tmp_path), request(tmp_path, "train.skips=[{step: 9, samples: 8}]")
    for one, other in ((before, after), (after, before)):
        (change,) = compare(one, other, step=step)
        assert (change.field, change.verdict) == ("skips", verdict)
