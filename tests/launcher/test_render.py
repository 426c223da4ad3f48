"""Texts for people, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import render
from launcher.build import outline
from launcher.commands.plan import plan_document
from launcher.config import compose
from launcher.describe import brief, describe
from launcher.render_events import event_line, progress_line
from launcher.render_plan import plan_text
from launcher.run import EventKind, RunEvent
from tests.support.golden import assert_golden
from tests.support.runs import T0, failed_run, recovered_run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plan-quickstart.txt", ["experiment=quickstart"]),
        ("plan-infeasible.txt", ["strategy.tp=3", "strategy.pp=9"]),
        ("plan-script.txt", ["job=script", "job.command=x", "cluster.spares=1"]),
        (
            "plan-175b.txt",
            [
                "model=gpt3_175b",
                "strategy.tp=8",
                "strategy.pp=8",
                "cluster.nodes=16",
                "cluster.slots_per_node=8",
                "train.precision=bf16",
                "train.global_batch=1536",
            ],
        ),
        ("plan-padding.txt", ["strategy.dp=3", "model=llama_tiny"]),
    ],
)
def test_plan(name: str, words: list[str]) -> None:
    """On machines that nothing is known about; test_render_estimate.py has the others."""
    config = compose([*words, "cluster.hardware=null"])
    sketch = outline(config)
    assert_golden(name, plan_text(plan_document(config, sketch), sketch.plan, sketch.cluster))


def test_summary_of_a_recovered_run(tmp_path: Path) -> None:
    document = describe(recovered_run(tmp_path), T0 + 100)
    text = render.summary(document, folder="elsewhere").replace(str(tmp_path), "RUNS")
    assert_golden("summary.txt", text)


def test_table_of_runs(tmp_path: Path) -> None:
    stores = [recovered_run(tmp_path, "one"), failed_run(tmp_path, "two")]
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "request.json").write_text("{}")
    rows = [brief(store) for store in stores]
    assert_golden("runs.txt", render.runs_table(rows))


def test_events_as_sentences(tmp_path: Path) -> None:
    lines = [line for event in recovered_run(tmp_path).events() if (line := event_line(event))]
    assert_golden("events.txt", "\n".join(lines))


def test_every_kind_of_event_can_be_shown() -> None:
    for kind in EventKind:
        event = RunEvent(seq=1, time=0.0, epoch=2, attempt=1, kind=kind, data={})
        assert event_line(event) is None or event_line(event)


def test_long_identities_are_cut() -> None:
    assert render.shorten_ids(f"node {'a' * 56} was lost") == "node aaaaaaaaaa was lost"
    assert render.node_name("worker-7.example.org") == "worker-7.example.org"


@pytest.mark.parametrize(
    ("number", "text"), [(4.24, "4.2 s"), (185, "3 m 05 s"), (7800, "2 h 10 m"), (59.96, "60.0 s"), (0, "0.0 s")]
)
def test_durations(number: float, text: str) -> None:
    assert render.seconds(number) == text


def test_sizes() -> None:
    assert [render.size(n) for n in (999, 1_500, 2.5e9)] == ["999 B", "1.5 kB", "2.5 GB"]
    assert [render.count(n) for n in (12, 1_334_016, 175e9)] == ["12", "1.3 M", "175.0 B"]


def test_progress_line() -> None:
    metric = {"step": 30, "loss": 5.25, "tokens_per_s": 1234.5}
    line = progress_line(state="running", attempt=2, steps=60, metric=metric, checkpoint=25, elapsed_s=65, bar=10)
    assert line == (
        "running     1 m 05 s  [=====     ] step 30/60  loss 5.2500  1234 tokens/s  attempt 2  checkpoint 25"
    )
    early = progress_line(state="queued", attempt=0, steps=None, metric={}, checkpoint=0, elapsed_s=1)
    assert early == "queued      1.0 s  no ranks yet"
