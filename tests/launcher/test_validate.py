"""Predicted against measured: the numbers of the comparison, and its text. Predictions are stand-ins here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launcher.calibration import validate as module
from launcher.calibration.metrics import agreement, ranks, spearman, verdicts
from launcher.calibration.rows import FITTED_ROWS
from launcher.calibration.validate import validate
from launcher.calibration.validation_text import percent, validation_text
from strategies.errors import ConfigError
from strategies.plan import ParallelPlan
from strategies.workload import Workload
from tests.launcher.test_rows import GOOD

GIB = 2.0**30


class Stage(NamedTuple):
    """As much of a stage's memory as the comparison looks at."""

    weights: float
    context: float
    fragmentation: float


class FakeTiming:
    """Predicts one second per tensor-parallel rank, with a band of 20 % either way."""

    def __init__(self, work: Workload) -> None:
        self.work = work

    def step(self, plan: ParallelPlan) -> tuple[float, ...]:
        """Two kinds of time."""
        if self.work.model.vocab == 666:
            raise ConfigError("No time for this one.")
        return (plan.tp * 0.75, plan.tp * 0.25)

    def band(self, plan: ParallelPlan, step_s: float) -> tuple[float, float, list[str]]:
        """Symmetric."""
        return step_s * 0.8, step_s * 1.2, ["far from home"] if plan.tp > 4 else []


class FakeMemory:
    """Predicts 10 GiB per micro-batch row, 2 of them not tensors, of 79.2."""

    def __init__(self, work: Workload) -> None:
        self.work = work

    def stage(self, plan: ParallelPlan, _stage: int) -> Stage:
        """Every stage alike."""
        share = 0.5 if plan.recompute == "full" and self.work.model.vocab == 777 else 1.0
        return Stage(share * plan.micro_batch * 10 * GIB - 2 * GIB, GIB, GIB)

    def peak(self, plan: ParallelPlan) -> float:
        """Of any stage."""
        return sum(self.stage(plan, 0))

    def budget(self) -> float:
        """All of it."""
        return float(self.work.cluster.device_memory_bytes)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the planner."""
    monkeypatch.setattr(module, "Timing", FakeTiming)
    monkeypatch.setattr(module, "Memory", FakeMemory)


def compare(tmp_path: Path, *changes: dict[str, str]) -> dict[str, Any]:
    """The comparison for a table of one row per set of changes."""
    columns = [*GOOD, "moe_experts", "moe_topk", "moe_ffn", "notes"]
    lines = [",".join(columns)]
    for number, change in enumerate(changes):
        row = {**GOOD, "id": f"row{number}", **change}
        lines.append(",".join(row.get(name, "") for name in columns))
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return validate(path)


PLANS = [{"tp": str(tp), "pp": "1", "dp": str(8 // tp)} for tp in (1, 2, 4, 8)]


@pytest.mark.usefixtures("fakes")
def test_the_documented_keys(tmp_path: Path) -> None:
    document = compare(tmp_path, {})
    json.dumps(document)
    assert {"overall", "families"} <= set(document)
    assert {"n", "mape", "median", "bias"} <= set(document["overall"]["step_time"])
    assert {"n", "mape", "median", "bias"} <= set(document["overall"]["memory"])
    assert set(document["overall"]["verdicts"]) == {"fit_right", "fit_wrong", "oom_right", "oom_wrong"}
    assert "spearman" in document["families"]["repo/table"]
    assert {"step_time", "memory", "verdicts"} <= set(document["families"]["repo/table"])


@pytest.mark.usefixtures("fakes")
def test_errors_are_signed_fractions_of_the_measurement(tmp_path: Path) -> None:
    document = compare(tmp_path, {"step_time_s": "1.6"}, {"step_time_s": "2.5"}, {"step_time_s": "2"})
    step = document["overall"]["step_time"]
    assert step["n"] == 3
    assert step["bias"] == pytest.approx((0.25 - 0.2 + 0) / 3)
    assert step["mape"] == pytest.approx(0.45 / 3)
    assert step["median"] == pytest.approx(0.2)
    assert document["overall"]["band_coverage"] == pytest.approx(2 / 3)
    assert document["overall"]["memory"]["n"] == 3
    assert document["overall"]["memory"]["bias"] == pytest.approx(0.0)


@pytest.mark.usefixtures("fakes")
def test_memory_is_counted_as_the_row_counts_it(tmp_path: Path) -> None:
    document = compare(tmp_path, {"peak_mem_gb": "18", "notes": "Peak ALLOCATED"})
    assert document["rows"][0]["memory"]["error"] == pytest.approx(0.0)


@pytest.mark.usefixtures("fakes")
def test_verdicts_count_runs_that_failed(tmp_path: Path) -> None:
    failed = {"outcome": "oom", "step_time_s": "", "peak_mem_gb": "", "dp": "2"}
    document = compare(
        tmp_path, {}, {"micro_batch": "8"}, {**failed, "micro_batch": "8"}, {**failed, "micro_batch": "1"}
    )
    assert document["overall"]["verdicts"] == {"fit_right": 1, "fit_wrong": 1, "oom_right": 1, "oom_wrong": 1}
    assert document["overall"]["step_time"]["n"] == 2
    text = validation_text(document)
    assert "Wrong verdicts" in text
    assert "1 of 2 runs that fitted, 1 of 2 that ran out of memory" in text


@pytest.mark.usefixtures("fakes")
def test_without_a_word_on_recomputation_the_least_that_fits_is_judged(tmp_path: Path) -> None:
    large = {"vocab": "777", "micro_batch": "8", "peak_mem_gb": ""}
    for recompute, fits in (("none", 0), ("full", 1), ("", 1)):
        document = compare(tmp_path, {**large, "recompute": recompute})
        assert document["overall"]["verdicts"]["fit_right"] == fits
    assert "least that fits" in document["rows"][0]["assumed"][0]


@pytest.mark.usefixtures("fakes")
def test_plans_are_ranked_inside_their_sweep(tmp_path: Path) -> None:
    rising = [{**plan, "step_time_s": str(1 + i)} for i, plan in enumerate(PLANS)]
    assert compare(tmp_path, *rising)["families"]["repo/table"]["spearman"] == pytest.approx(1.0)
    falling = [{**plan, "step_time_s": str(9 - i)} for i, plan in enumerate(PLANS)]
    document = compare(tmp_path, *falling)
    assert document["families"]["repo/table"]["spearman"] == pytest.approx(-1.0)
    assert document["sweeps"][0]["n"] == 4
    assert "Ranking of plans" in validation_text(document)
    assert compare(tmp_path, *rising[:3])["families"]["repo/table"]["spearman"] is None


@pytest.mark.usefixtures("fakes")
def test_few_skipped_rows_do_not_count(tmp_path: Path) -> None:
    document = compare(tmp_path, *[{"step_time_s": "2"}] * 19, {"gpu": "Gaudi 2"})
    assert document["skipped"]["n"] == 1
    assert document["skipped"]["counted_as_wrong"] is False
    assert document["overall"]["step_time"]["mape"] == pytest.approx(0.0)
    assert "they do not count" in validation_text(document)


@pytest.mark.usefixtures("fakes")
def test_many_skipped_rows_count_as_wrong(tmp_path: Path) -> None:
    document = compare(tmp_path, {"step_time_s": "2"}, {"gpu": "Gaudi 2"})
    step = document["overall"]["step_time"]
    assert (step["n"], step["mape"], step["bias"]) == (2, pytest.approx(0.5), pytest.approx(-0.5))
    assert document["overall"]["memory"]["n"] == 2
    assert document["overall"]["verdicts"]["fit_wrong"] == 1
    assert "each counts as a prediction of nothing" in validation_text(document)
    assert "Gaudi 2" in validation_text(document)


@pytest.mark.usefixtures("fakes")
def test_a_prediction_that_fails_is_a_skipped_row(tmp_path: Path) -> None:
    document = compare(tmp_path, {"vocab": "666"})
    assert document["skipped"]["rows"][0]["reason"] == "No time for this one."
    assert document["families"]["repo/table"]["step_time"]["mape"] == 1.0
    assert validation_text(document)


@pytest.mark.usefixtures("fakes")
def test_rows_of_the_fit_are_told_apart(tmp_path: Path) -> None:
    lines = FITTED_ROWS.read_text().splitlines()
    path = tmp_path / "some.csv"
    path.write_text("\n".join([*lines[:4], lines[4].replace("9.399", "9.5")]) + "\n")
    document = validate(path)
    assert [row["seen"] for row in document["rows"]] == [True, True, True, False]
    assert document["fit"]["seen"]["step_time"]["n"] == 3
    assert document["fit"]["unseen"]["step_time"]["n"] == 1


@pytest.mark.usefixtures("fakes")
def test_each_calibration_in_use_is_listed_once(tmp_path: Path) -> None:
    document = compare(tmp_path, {}, {}, {"gpu": "V100-32GB", "precision": "fp16"})
    assert len(document["calibrations"]) == 2
    assert list(document["devices"]) == ["A100-80GB megatron bf16", "V100-32GB megatron fp16"]


@pytest.mark.usefixtures("fakes")
def test_the_text_names_the_worst_rows(tmp_path: Path) -> None:
    text = validation_text(compare(tmp_path, {"step_time_s": "200"}, {"step_time_s": "2"}))
    worst = text.split("Furthest off, step time")[1].splitlines()[2]
    assert worst.split()[0] == "row0"
    assert worst.split()[-2:] == ["-99.0", "%"]


def test_nothing_to_summarise() -> None:
    nothing = {"n": 0, "mape": None, "median": None, "bias": None, "under": None, "over": None}
    assert agreement([]) == nothing
    assert verdicts([]) == {"fit_right": 0, "fit_wrong": 0, "oom_right": 0, "oom_wrong": 0}
    assert percent(None) == "-"


def test_equal_values_share_a_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1], [1]) is None


def test_bad_cells_end_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 2 problems"):
        compare(tmp_path, {"tp": "x", "pp": "y"})


@pytest.mark.usefixtures("fakes")
def test_fitted_constants_of_time_and_of_memory_are_counted(tmp_path: Path) -> None:
    document = compare(tmp_path, {})
    assert document["constants"] == {"step_time": {"fitted": 18, "runs": 303}, "memory": {"fitted": 5, "runs": 40}}
    assert "18 of step time (fitted on 303 runs), 5 of memory (fitted on 40 runs)" in validation_text(document)
