"""The report: one page, complete, closed in itself and to whoever names a model after a script."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launcher.build import outline, workload
from launcher.config import compose
from launcher.report import write_report
from launcher.report.gantt import step_timeline
from launcher.report.page import page
from launcher.report.pipeline import Timeline, simulate
from launcher.report.sample import sample
from launcher.report.svg import spread, ticks
from strategies.errors import StorageError
from strategies.estimate import Estimator
from strategies.plan import ParallelPlan, Schedule
from strategies.space import Space
from tests.support.estimates import CLUSTER, PLAN, plan_document, search_document

VOID = {"meta", "br", "hr", "img", "link", "input"}
SECTIONS = {"time", "memory", "schedule", "placement", "finish", "failures", "ladder", "advice", "search"}


class Checker(HTMLParser):
    """Collects ids and text, and insists that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids |= {value for name, value in attrs if name == "id" and value}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parsed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    return checker


def many(plan: ParallelPlan, **changes: Any) -> tuple[ParallelPlan, int]:
    """A changed plan and the nodes of 8 that it takes."""
    changed = replace(plan, **changes)
    return changed, -(-changed.world_size // 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pp": 1, "stages": (12,), "dp": 8},
        {"schedule": "interleaved", "vpp": 3},
        {"schedule": "dualpipev"},
        {"pp": 40, "stages": (1,) * 40, "dp": 16, "tp": 8},
        {"dp": 500},
    ],
)
def test_page_is_whole_and_closed(changes: dict[str, Any]) -> None:
    plan, nodes = many(PLAN, **changes)
    cluster = replace(CLUSTER, nodes=nodes)
    text = page(plan_document(plan, cluster, search=search_document()), plan, cluster)
    checker = parsed(text)
    assert checker.ids >= SECTIONS
    assert not checker.tags & {"script", "link", "img", "iframe"}
    assert not [value for name, value in checker.attributes if name in ("src", "href")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert len(text) < 600_000


def test_numbers_are_on_the_page_with_their_units() -> None:
    text = page(plan_document(search=search_document()), PLAN, CLUSTER)
    words = " ".join(parsed(text).words)
    for expected in ("3.65 s", "52.0 GB", "80.0 GB", "45.2 %", "97.2 %", "13.3 d", "$12.3 k", "100,000 plans"):
        assert expected in words, expected


def test_page_without_tokens_failures_memory_and_ladder() -> None:
    document = plan_document(ladder=[], warnings=[])
    estimate = document["estimate"]
    estimate["memory"]["budget_bytes"] = None
    estimate["failures"] |= {"mtbf_s": None, "days_50": None, "days_90": None, "cost_50_usd": None}
    words = " ".join(parsed(page(document, PLAN, CLUSTER)).words)
    assert "No failures expected" in words
    assert "train.tokens" in words
    assert "does not say how much memory" in words


def test_page_shows_the_range_of_finish_and_cost_or_that_there_is_none() -> None:
    document = plan_document()
    words = " ".join(parsed(page(document, PLAN, CLUSTER)).words)
    assert "80 %: 12.4 to 14.1 d" in words
    assert "80 %: $11.5 k to $13.0 k" in words
    nothing = dict.fromkeys(("days_low", "days_50", "days_90", "cost_low_usd", "cost_50_usd", "cost_90_usd"))
    document["estimate"]["failures"] |= {**nothing, "never": "failures undo the work"}
    words = " ".join(parsed(page(document, PLAN, CLUSTER)).words)
    assert "It never ends: failures undo the work." in words


def test_names_are_escaped() -> None:
    document = plan_document(warnings=["<script>alert(1)</script>"])
    document["model"]["name"] = '<b onmouseover="x">&'
    text = page(document, PLAN, replace(CLUSTER, device="<i>"))
    assert "<script" not in text
    assert "<b on" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text


def test_report_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "plan.html"
    target.write_text("old")
    write_report(target, plan_document(), PLAN, CLUSTER)
    assert target.read_text().startswith("<!doctype html>")
    assert [one.name for one in tmp_path.iterdir()] == ["plan.html"]
    with pytest.raises(StorageError, match="there is no folder"):
        write_report(tmp_path / "nowhere" / "plan.html", plan_document(), PLAN, CLUSTER)
    with pytest.raises(StorageError, match="is a folder"):
        write_report(tmp_path, plan_document(), PLAN, CLUSTER)


# ---- the schedule ------------------------------------------------------------------------------------------------


def timeline(schedule: Schedule, pp: int, micro_batches: int, vpp: int = 1) -> Timeline:
    return simulate(
        schedule=schedule, pp=pp, micro_batches=micro_batches, forward=[1.0] * pp, backward=[2.0] * pp, vpp=vpp
    )


@pytest.mark.parametrize(("pp", "micro_batches"), [(1, 1), (1, 5), (2, 1), (4, 2), (4, 4), (4, 9), (15, 36), (64, 128)])
def test_one_f_one_b_takes_what_the_formula_says(pp: int, micro_batches: int) -> None:
    found = timeline("1f1b", pp, micro_batches)
    assert found.makespan == pytest.approx((micro_batches + pp - 1) * 3.0)
    assert found.bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1))


@pytest.mark.parametrize(("pp", "micro_batches", "vpp"), [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 64, 4)])
def test_interleaving_divides_the_bubble(pp: int, micro_batches: int, vpp: int) -> None:
    found = timeline("interleaved", pp, micro_batches, vpp)
    assert found.makespan == pytest.approx((micro_batches + (pp - 1) / vpp) * 3.0)


@pytest.mark.parametrize("micro_batches", [1, 3, 5, 17])
def test_interleaving_of_odd_batches_ends(micro_batches: int) -> None:
    found = timeline("interleaved", 4, micro_batches, 2)
    assert len(found.passes) == 4 * micro_batches * 2 * 2


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (4, 20), (5, 13), (15, 40)])
def test_dual_pipe_v_has_a_smaller_bubble(pp: int, micro_batches: int) -> None:
    found = timeline("dualpipev", pp, micro_batches)
    assert found.bubble < timeline("1f1b", pp, micro_batches).bubble
    weights = [one for one in found.passes if one.kind == "W"]
    assert len(weights) == pp * 2 * micro_batches


@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("interleaved", 2), ("dualpipev", 1)])
def test_ranks_do_one_thing_at_a_time_and_wait_for_their_inputs(schedule: Schedule, vpp: int) -> None:
    found = timeline(schedule, 4, 8, vpp)
    for rank in range(4):
        own = [one for one in found.passes if one.rank == rank]
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    ended = {(one.kind, one.rank, one.chunk, one.micro): one.end for one in found.passes}
    for one in found.passes:
        if one.kind == "F" and one.rank > 0 and one.chunk == 0:
            assert one.start >= ended["F", one.rank - 1, 0, one.micro]
        if one.kind == "B":
            assert one.start >= ended["F", one.rank, one.chunk, one.micro]


def test_many_micro_batches_are_cut() -> None:
    document = plan_document(replace(PLAN, grad_accum=500))
    found = step_timeline(document["plan"], document["estimate"]["time"])
    assert found.micro_batches < 20
    assert "of 500 micro-batches" in page(document, PLAN, CLUSTER)


# ---- axes --------------------------------------------------------------------------------------------------------


def test_ticks_are_round() -> None:
    assert ticks(85.0) == [0.0, 20.0, 40.0, 60.0, 80.0]
    assert ticks(0.0) == [0.0]
    assert ticks(float("inf")) == [0.0]


def test_labels_keep_apart() -> None:
    placed = spread([10.0, 11.0, 12.0], 5.0, 0.0, 100.0)
    assert all(b - a >= 5 for a, b in itertools.pairwise(placed))
    assert spread([98.0, 99.0], 5.0, 0.0, 100.0) == [95.0, 100.0]


def test_sample_of_the_space_is_the_same_twice() -> None:
    work = workload(config := compose(["experiment=quickstart"]), outline(config))
    assert work is not None
    drawn = [sample(Estimator(work), Space(work, runnable_only=True), 50) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 20
    assert all(seconds > 0 and peak > 0 for seconds, peak in drawn[0])
