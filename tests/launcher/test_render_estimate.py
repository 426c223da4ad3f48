"""An estimate as text, to the letter, and in its corners."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest

from launcher import quantities
from launcher.render_estimate import arithmetic_text, estimate_text, failures_text, forecast_line, memory_text
from launcher.render_plan import plan_text
from launcher.report.page import page
from tests.support.estimates import CLUSTER, PLAN, estimate_document, plan_document
from tests.support.golden import assert_golden

TODAY = datetime.date(2026, 3, 1)
TIGHT = "fits tightly (52.0 GB per rank of 54.0 GB; the prediction errs by 7 %), "


def test_plan_with_estimate() -> None:
    assert_golden("plan-estimate.txt", plan_text(plan_document(), PLAN, CLUSTER, TODAY))


def test_plan_that_does_not_fit() -> None:
    document = plan_document(fits=False)
    document["estimate"]["memory"]["budget_bytes"] = 40e9
    broken = {"rule": "memory_fits", "message": "too much by 12 GB", "hint": "strategy.recompute=full (31 GB)"}
    document["violations"] = [broken]
    text = plan_text(document, PLAN, CLUSTER, TODAY)
    assert "memory_fits: too much by 12 GB" in text
    assert "it does NOT fit, 12.0 GB too much" in text
    assert "neighbours of this plan that fit" in text
    assert "This plan can run" not in text


def test_plan_that_fits_tightly() -> None:
    document = plan_document()
    for budget, words in ((60e9, "fits (52.0 GB per rank of 60.0 GB), "), (54e9, TIGHT)):
        document["estimate"]["memory"]["budget_bytes"] = budget
        assert f"forecast:   {words}" in plan_text(document, PLAN, CLUSTER, TODAY)
    assert "It fits tightly (52.0 GB per rank of 54.0 GB; " in page(document, PLAN, CLUSTER)


RUNS = "compared with the plans that phalanx runs, with gradients in fp32"
BETTER = "beaten by TP9 (16 % better in tokens per second that survive failures: 3.00 s per step, "


@pytest.mark.parametrize(
    ("best", "words"),
    [
        ({}, f"{BETTER}55.0 GB per rank; {RUNS})"),
        ({"runnable": False, "fixed": {}}, f"{BETTER}55.0 GB per rank; modelled only; {RUNS.split(',')[0]})"),
        ({"peak_bytes": 79e9}, f"{BETTER}79.0 GB per rank; fits tightly; {RUNS})"),
        ({"warnings": ["sp=2: nobody knows"]}, f"{BETTER}55.0 GB per rank; sp=2: nobody knows; {RUNS})"),
        (
            {"better": -0.1, "among_runnable": False, "objective": "time"},
            "no other plan is more than 1 % better in seconds per step without failures (compared with all plans, "
            "modelled ones too, with gradients in fp32)",
        ),
    ],
)
def test_what_beats_a_plan(best: dict[str, Any], words: str) -> None:
    other = {"plan_text": "TP9", "step_s": 3.0, "peak_bytes": 55e9, "runnable": True, "better": 0.16}
    other |= {"among_runnable": True, "objective": "goodput", "fixed": {"grad_dtype": "fp32"}, "warnings": []}
    document = plan_document(best=other | best)
    assert f"\n\n{words}\n\n" in plan_text(document, PLAN, CLUSTER, TODAY)
    assert f"{words[0].upper()}{words[1:]}." in page(document, PLAN, CLUSTER)
    document["estimate"]["fits"] = False
    assert "the best plan that fits, by " in plan_text(document, PLAN, CLUSTER, TODAY)


def test_plan_that_can_be_modelled_only() -> None:
    document = plan_document(runnable=False, modelled_reason="sp 2 is modelled only")
    document["violations"] = [{"rule": "combination_runs", "message": "sp 2 is modelled only", "hint": "strategy.sp=1"}]
    text = plan_text(document, PLAN, CLUSTER, TODAY)
    assert "cannot run" not in text
    assert "modelled only; submit would refuse it: sp 2 is modelled only (strategy.sp=1)." in text


def test_lines_fit_a_terminal() -> None:
    text = estimate_text(estimate_document(), TODAY)
    assert max(len(line) for line in text.splitlines()) <= 120


def test_equal_stages_share_a_row_and_many_are_cut() -> None:
    plan = replace(PLAN, pp=20, stages=(1,) * 20)
    estimate = estimate_document(plan)
    rows = memory_text(estimate).splitlines()
    assert len(rows) <= 10
    assert any(row.strip() == "..." for row in rows)
    stages = estimate["memory"]["stages"]
    estimate["memory"]["stages"] = [{**stages[5], "stage": i} for i in range(20)]
    assert memory_text(estimate).splitlines()[2].split()[0] == "0-19"


def test_unknown_memory_tokens_failures_and_price() -> None:
    estimate: dict[str, Any] = estimate_document()
    estimate["memory"]["budget_bytes"] = None
    estimate["failures"] |= {"mtbf_s": None, "days_50": None, "days_90": None, "cost_50_usd": None, "spares_wanted": 0}
    text = estimate_text(estimate, TODAY)
    assert "does not say how much a device has" in text
    assert "none expected" in text
    assert "train.tokens" in text
    assert "cost:" not in text
    assert "goodput" not in text


def test_finish_is_a_date() -> None:
    text = failures_text(estimate_document(), TODAY)
    assert "2026-03-14 (13.3 d); 10 %: by 2026-03-13 (12.4 d); 90 %: by 2026-03-15 (14.1 d)" in " ".join(text.split())
    estimate: dict[str, Any] = estimate_document()
    estimate["failures"] |= {"days_50": 9e9, "days_90": 9e9}
    assert "never" in failures_text(estimate, TODAY)


def test_a_step_that_is_known_roughly_gives_a_range() -> None:
    estimate: dict[str, Any] = estimate_document()
    assert "finished in 13.3 d, $12.3 k" in forecast_line(estimate)
    estimate["time"] |= {"low_s": 2.0, "high_s": 6.0}
    assert "finished in 12.4 to 14.1 d, $11.5 k to $13.0 k" in forecast_line(estimate)


def test_a_run_that_never_ends_says_why() -> None:
    estimate: dict[str, Any] = estimate_document()
    nothing = dict.fromkeys(("days_low", "days_50", "days_90", "cost_low_usd", "cost_50_usd", "cost_90_usd"))
    estimate["failures"] |= {**nothing, "never": "failures undo the work"}
    assert "never finished" in forecast_line(estimate)
    assert "never: failures undo the work" in failures_text(estimate, TODAY)


def test_arithmetic_names_every_term() -> None:
    term = {"kind": "gemm", "value": 2.0, "unit": "s", "formula": "flops / rate", "numbers": "6e14 / 3e14"}
    text = arithmetic_text({"time": [term], "memory": [], "memory_stage": 3, "failures": []})
    assert text.splitlines() == [
        "seconds of one step:",
        "  gemm = 2.00 s",
        "      flops / rate",
        "      6e14 / 3e14",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3e-7, "0.300 us"), (0.0173, "17.3 ms"), (23.12, "23.1 s"), (600, "10.0 min"), (7200, "2.00 h"), (3e6, "34.7 d")],
)
def test_spans(seconds: float, words: str) -> None:
    assert quantities.span(seconds) == words


def test_quantities() -> None:
    assert quantities.digits(1234.5) == "1,234"
    assert quantities.digits(0.01234) == "0.0123"
    assert quantities.digits(float("inf")) == "unlimited"
    assert quantities.percent(0.0001) == "< 0.1 %"
    assert quantities.percent(0.99999) == "> 99.9 %"
    assert quantities.percent(0.123) == "12.3 %"
    assert quantities.gain(0.071) == "+7.1 %"
    assert quantities.gain(0.32) == "+32 %"
    assert quantities.dollars(63.2e6) == "$63.2 M"
    assert quantities.dollars(312) == "$312"
    assert quantities.days(36 * 365.25) == "36.0 years"
    assert quantities.extent(80.2, 140, quantities.days) == "80.2 to 140 d"
    assert quantities.extent(0.01, 140, quantities.days) == "14.4 min to 140 d"
    assert quantities.extent(9.5e5, 1.9e6, quantities.dollars) == "$950 k to $1.90 M"
    assert quantities.storage(None) == "unknown"
    assert quantities.storage(61.24e9) == "61.2 GB"
