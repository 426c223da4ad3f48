"""The fit of the planner's constants: it reproduces what it wrote, counts what it fits and does not look at names."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.calibration import fit as fitting
from launcher.calibration.fit import PRIORS, Spread
from launcher.calibration.rows import FITTED_ROWS, Row, read_rows
from strategies import calibrated
from strategies.calibrated import Constant
from strategies.calibration import CONTEXT_RUNS, EXPERT_RUNS, assemble
from strategies.timing import Timing

pytest.importorskip("scipy", reason="the fit needs scipy, predictions do not")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return fitting.usable(read_rows(FITTED_ROWS).rows)


def synthetic(rows: list[Row], constants: tuple[Constant, ...]) -> list[Row]:
    """The same runs, measured on a machine that the model describes exactly."""
    made = []
    for row in rows:
        step = Timing(row.work, assemble(*fitting.key_of(row), constants)).step(row.plan)
        made.append(replace(row, step_s=sum(step)))
    return made


def test_the_fit_finds_the_constants_that_made_the_data(rows: list[Row]) -> None:
    few = [row for row in rows if fitting.origin(row) in ("bigscience", "calculon", "Megatron-LM")][::2]
    truth = tuple(
        constant._replace(value=0.68 if constant[:2] == ("linear", "A100") else constant.value) for constant in PRIORS
    )
    found = {constant[:4]: constant.value for constant in fitting.fit(synthetic(few, truth))}
    assert found["linear", "A100", "*", "16"] == pytest.approx(0.68, rel=0.02)


def test_constants_without_rows_keep_their_priors(rows: list[Row]) -> None:
    few = [row for row in rows if fitting.origin(row) == "calculon"]
    fitted = {constant[:4]: constant.value for constant in fitting.fit(few)}
    for prior in PRIORS:
        if prior.device in ("V100", "H100", "B200") or prior.framework in ("fsdp", "mcore"):
            assert fitted[prior[:4]] == pytest.approx(prior.value, rel=1e-6)


def test_the_written_constants_fit_the_rows_they_were_fitted_to(rows: list[Row]) -> None:
    assert len(rows) == calibrated.ROWS
    mape, median = fitting.error(fitting.residuals(rows, calibrated.CONSTANTS))
    assert (mape, median) == pytest.approx(calibrated.ERRORS["seen"], rel=0.05)
    assert mape <= 0.10
    assert median <= 0.07


def test_the_written_constants_are_an_optimum(rows: list[Row]) -> None:
    again = fitting.fit(rows, calibrated.CONSTANTS, evaluations=2)
    for new, old in zip(again, calibrated.CONSTANTS, strict=True):
        assert new[:4] == old[:4]
        assert new.value == pytest.approx(old.value, rel=0.05), old


def test_unseen_rows_are_within_the_promised_error() -> None:
    for kind in ("family left out", "tenth left out"):
        mape, median = calibrated.ERRORS[kind]
        assert mape <= 0.10
        assert median <= 0.07


def test_priors_name_what_may_be_fitted() -> None:
    assert len(PRIORS) <= calibrated.ROWS / 10
    assert [prior[:4] for prior in PRIORS] == [constant[:4] for constant in calibrated.CONSTANTS]
    for prior in PRIORS:
        assert prior.least < prior.value < prior.most


def test_rows_are_known_by_device_framework_and_precision_only(rows: list[Row]) -> None:
    one = rows[0]
    other = replace(one, id="another", family="elsewhere/table", notes="", sweep="")
    other = replace(other, work=replace(one.work, model=replace(one.work.model, name="another")))
    assert fitting.key_of(other) == fitting.key_of(one)
    assert fitting.residuals([other], calibrated.CONSTANTS) == fitting.residuals([one], calibrated.CONSTANTS)


def test_bands_hold_what_was_not_seen(rows: list[Row]) -> None:
    zero = {row.id: 0.0 for row in rows}
    skewed = zero | {row.id: 0.5 for row in rows if row.work.framework == "fsdp"}
    found = fitting.bands(rows, Spread(zero, skewed, skewed))
    assert found["fsdp"] == (0.5, 0.5)
    assert found["megatron"] == (0.0, 0.0)
    assert found["experts"] == (-0.3, 0.3), "few rows: never narrower than this"


def test_quantiles_leave_a_tenth_outside() -> None:
    low, high = fitting._quantiles([float(value) for value in range(-100, 101)])
    assert -95 <= low <= -90
    assert 90 <= high <= 95


def test_large_tables_count_for_less(rows: list[Row]) -> None:
    weights = dict(zip((row.id for row in rows), fitting._weights(rows), strict=True))
    small = next(row for row in rows if fitting.origin(row) == "calculon")
    large = next(row for row in rows if fitting.origin(row) == "vTrain")
    assert weights[small.id] == 1.0
    assert weights[large.id] == pytest.approx(math.sqrt(50 / 120))


def test_robust_residuals_keep_their_sign_and_grow_slowly() -> None:
    assert fitting._robust(0.001) == pytest.approx(0.001, rel=1e-3)
    assert -0.3 < fitting._robust(-0.5) < -0.15


def test_a_table_of_runs_can_be_fitted_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = FITTED_ROWS.read_text().splitlines(keepends=True)
    runs = tmp_path / "runs.csv"
    runs.write_text("".join([lines[0], *(line for line in lines[1:] if line.startswith(("sc21", "korthi")))]))
    target = tmp_path / "calibrated.py"
    target.write_text(Path(calibrated.__file__).read_text())
    monkeypatch.setattr(fitting, "TARGET", target)
    monkeypatch.setattr(fitting, "FOLDS", 2)
    assert fitting.main([str(runs), "--write"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(PRIORS)} constants, 18 rows" in printed
    written: dict[str, object] = {}
    exec(compile(target.read_text(), str(target), "exec"), written)
    assert written["ROWS"] == 18
    assert len(list(written["CONSTANTS"])) == len(PRIORS)  # type: ignore[call-overload]


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_written_constants_are_what_the_fit_writes(rows: list[Row]) -> None:
    constants = fitting.fit(rows)
    text = fitting.render(rows, constants, fitting.cross_validate(rows, constants))
    written: dict[str, Any] = {"Constant": Constant}
    exec(text, written)
    assert (written["ROWS"], written["RUNS"]) == (calibrated.ROWS, calibrated.RUNS)
    assert written["RANGES"] == calibrated.RANGES
    for new, old in zip(written["CONSTANTS"], calibrated.CONSTANTS, strict=True):
        assert new.value == pytest.approx(old.value, rel=0.02), old
    for name in ("BANDS", "ERRORS"):
        assert set(written[name]) == set(getattr(calibrated, name))
        for key, pair in getattr(calibrated, name).items():
            assert written[name][key] == pytest.approx(pair, abs=0.02), (name, key)


def test_runs_with_rare_degrees_are_counted(rows: list[Row]) -> None:
    """What the warnings of a band say: few fitted runs have experts or contexts in parallel, none tp over nodes."""
    plans = [row.plan for row in rows]
    assert sum(plan.ep > 1 for plan in plans) == EXPERT_RUNS
    assert sum(plan.cp > 1 for plan in plans) == CONTEXT_RUNS
    assert not any(row.plan.tp > row.work.cluster.slots_per_node for row in rows)
