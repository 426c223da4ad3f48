"""Fits the constants of :mod:`strategies.calibrated` to published runs: ``python -m launcher.calibration.fit --write``.

Robust least squares (soft L1) on the logarithm of measured over predicted step time, with a weak pull of every constant
towards a prior. Rows of one table share their machine and software, so the rows of a large table count for less. The
error that counts is that of rows which the fit has not seen: whole families are left out in turn, and tenths of all
rows. Prints the number of constants, the constants at the ends of their ranges and the errors; needs scipy.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from launcher.calibration.rows import FITTED_ROWS, Row, read_rows
from strategies import calibrated
from strategies.calibrated import Constant
from strategies.calibration import Calibration, assemble, generation, width_of
from strategies.timing import Timing
from strategies.workload import Framework

PRIORS: tuple[Constant, ...] = (
    Constant("linear", "V100", "*", "16", 0.65, 0.4, 0.95),
    Constant("linear", "A100", "*", "16", 0.75, 0.5, 0.9),
    Constant("linear", "H100", "*", "16", 0.65, 0.35, 0.85),
    Constant("linear", "H100", "fsdp", "fp8", 0.55, 0.2, 0.8),
    Constant("linear", "H100", "mcore", "fp8", 0.65, 0.2, 0.8),
    Constant("linear", "B200", "*", "fp8", 0.65, 0.2, 0.85),
    Constant("batched", "*", "*", "*", 0.5, 0.15, 0.9),
    Constant("flash", "A100", "fsdp", "*", 0.35, 0.15, 0.7),
    Constant("flash", "H100", "fsdp", "*", 0.25, 0.1, 0.7),
    Constant("traffic", "*", "megatron", "*", 1.5, 0.8, 5.0),
    Constant("traffic", "*", "fsdp", "*", 1.5, 0.8, 5.0),
    Constant("host_block_s", "*", "megatron", "*", 0.0011, 2e-4, 4e-3),
    Constant("skew_s", "*", "megatron", "*", 1e-4, 1e-5, 1e-3),
    Constant("host_step_s", "*", "megatron", "*", 0.006, 1e-3, 0.05),
    Constant("host_experts_s", "*", "*", "*", 0.005, 5e-4, 0.02),
    Constant("wave", "*", "*", "*", 0.1, 0.02, 1.0),
    Constant("buckets", "*", "megatron", "*", 0.6, 0.15, 1.0),
    Constant("dp_exposed", "*", "fsdp", "*", 0.4, 0.02, 1.0),
)
"""The constants that are fitted: where they apply, their priors, and the ranges that physics allows. Peaks follow the
measured matmul ceilings of stas00/ml-engineering (80 to 87 %), less for products inside of a training step."""

PRIOR_WEIGHT = 0.2
ROBUST = 0.05
"""Residuals (of the logarithm) up to this size count squared, larger ones linearly."""

FAMILY_ROWS = 50
FOLDS = 10
MARK = "# --- written by python -m launcher.calibration.fit --write ---"
TARGET = Path(calibrated.__file__)

Key = tuple[str, Framework, str]
Residuals = dict[str, float]


class Spread(NamedTuple):
    """Logarithms of measured over predicted, by name of the row."""

    seen: Residuals
    families: Residuals
    folds: Residuals


def usable(rows: Iterable[Row]) -> list[Row]:
    """Rows with a measured step."""
    return [row for row in rows if row.step_s]


def key_of(row: Row) -> Key:
    """What the row's constants are keyed by."""
    return generation(row.work.cluster.device), row.work.framework, width_of(row.work.precision)


def origin(row: Row) -> str:
    """The family of a row for cross-validation: all tables of one repository."""
    return row.family.split("/")[0]


def residuals(rows: Sequence[Row], constants: Sequence[Constant]) -> list[float]:
    """Logarithm of measured over predicted step time of every row."""
    made: dict[Key, Calibration] = {}
    return [residual(row, made.setdefault(key_of(row), assemble(*key_of(row), constants))) for row in rows]


def residual(row: Row, calibration: Calibration) -> float:
    """Logarithm of measured over predicted step time of one row."""
    assert row.step_s is not None
    return math.log(row.step_s / sum(Timing(row.work, calibration).step(row.plan)))


def fit(rows: Sequence[Row], start: Sequence[Constant] = PRIORS, evaluations: int = 30) -> tuple[Constant, ...]:
    """Constants that describe ``rows`` best; those that no row depends on keep their priors."""
    from scipy.optimize import least_squares

    weights = _weights(rows)

    def objective(logs: Sequence[float]) -> list[float]:
        constants = _constants(logs)
        data = [w * _robust(r) for w, r in zip(weights, residuals(rows, constants), strict=True)]
        pull = [PRIOR_WEIGHT * math.log(c.value / p.value) for c, p in zip(constants, PRIORS, strict=True)]
        return data + pull

    found = least_squares(
        objective,
        [math.log(constant.value) for constant in start],
        jac=_jacobian(rows, weights),
        bounds=([math.log(p.least) - 1e-9 for p in PRIORS], [math.log(p.most) + 1e-9 for p in PRIORS]),
        max_nfev=evaluations,
        ftol=1e-6,
        xtol=1e-5,
    )
    return _constants(found.x)


def _constants(logs: Iterable[float]) -> tuple[Constant, ...]:
    return tuple(prior._replace(value=math.exp(log)) for prior, log in zip(PRIORS, logs, strict=True))


def _robust(value: float) -> float:
    """Soft L1 in a form whose square is the loss."""
    scaled = (value / ROBUST) ** 2
    return math.copysign(ROBUST * math.sqrt(2.0 * (math.sqrt(1.0 + scaled) - 1.0)), value)


def _weights(rows: Sequence[Row]) -> list[float]:
    sizes: dict[str, int] = defaultdict(int)
    for row in rows:
        sizes[origin(row)] += 1
    return [min(1.0, math.sqrt(FAMILY_ROWS / sizes[origin(row)])) for row in rows]


def _jacobian(rows: Sequence[Row], weights: Sequence[float]) -> Callable[[Sequence[float]], list[list[float]]]:
    """Derivatives by finite differences, only of rows that a constant concerns."""
    keys = [key_of(row) for row in rows]

    def jacobian(logs: Sequence[float]) -> list[list[float]]:
        base = _constants(logs)
        before = {key: assemble(*key, base) for key in set(keys)}
        at = [_robust(residual(row, before[key])) for row, key in zip(rows, keys, strict=True)]
        columns = []
        for index, constant in enumerate(base):
            moved = [*base[:index], constant._replace(value=constant.value * math.exp(_STEP)), *base[index + 1 :]]
            after = {key: assemble(*key, moved) for key in before}
            column = [
                w * (_robust(residual(row, after[key])) - here) / _STEP if after[key] != before[key] else 0.0
                for row, key, w, here in zip(rows, keys, weights, at, strict=True)
            ]
            columns.append(column + [PRIOR_WEIGHT * (other == index) for other in range(len(base))])
        return [list(line) for line in zip(*columns, strict=True)]

    return jacobian


_STEP = 1e-3


# ---- rows that the fit has not seen ---------------------------------------------------------------------------------


def cross_validate(rows: Sequence[Row], constants: Sequence[Constant]) -> Spread:
    """Residuals of rows that were fitted, whose family was left out, and whose tenth was left out."""
    seen = {row.id: r for row, r in zip(rows, residuals(rows, constants), strict=True)}
    families: Residuals = {}
    for name in sorted({origin(row) for row in rows}):
        families |= _held_out(rows, [row for row in rows if origin(row) == name], PRIORS)
    order = list(rows)
    random.Random(0).shuffle(order)
    folds: Residuals = {}
    for fold in range(FOLDS):
        folds |= _held_out(rows, order[fold::FOLDS], constants)
    return Spread(seen, families, folds)


def _held_out(rows: Sequence[Row], tested: Sequence[Row], start: Sequence[Constant]) -> Residuals:
    names = {row.id for row in tested}
    constants = fit([row for row in rows if row.id not in names], start, evaluations=12)
    return {row.id: r for row, r in zip(tested, residuals(tested, constants), strict=True)}


def kind_of(row: Row) -> str:
    """Whose band a row belongs to."""
    return row.work.framework if row.dense else "experts"


def unseen(rows: Sequence[Row], spread: Spread) -> Residuals:
    """The residual that a band has to hold: of the left-out family where another one shares the key, else of the fold.

    Without any other family on the same key, leaving it out says how good the priors are, not the fit.
    """
    owners: dict[Key, set[str]] = defaultdict(set)
    for row in rows:
        owners[key_of(row)].add(origin(row))
    return {row.id: (spread.families if len(owners[key_of(row)]) > 1 else spread.folds)[row.id] for row in rows}


def bands(rows: Sequence[Row], spread: Spread) -> dict[str, tuple[float, float]]:
    """The 90 % band of every kind: quantiles of the residuals of rows that were not seen (split conformal)."""
    values: dict[str, list[float]] = defaultdict(list)
    chosen = unseen(rows, spread)
    for row in rows:
        values[kind_of(row)].append(chosen[row.id])
    found = {kind: _quantiles(values[kind]) for kind in sorted(values)}
    every = [value for kind in ("mcore", "experts") for value in values.get(kind, [])]
    width = max([_LEAST, *(abs(value) for value in every)])
    return found | {"new": (-width, width)}


_FEW, _LEAST = 20, 0.3


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The 5 % and 95 % quantiles, widened as a small sample demands."""
    ordered, count = sorted(values), len(values)
    if count < _FEW:  # too few for quantiles: the largest, to both sides
        width = max(_LEAST, *(abs(value) for value in values))
        return -width, width
    rank = min(count - 1, math.ceil(0.95 * (count + 1)) - 1)
    return ordered[count - 1 - rank], ordered[rank]


# ---- what is written ------------------------------------------------------------------------------------------------


def ranges(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float]]]:
    """Smallest and largest of what a prediction may depend on, per framework."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        limits = found.setdefault(row.work.framework, {})
        for name, value in sizes(row).items():
            low, high = limits.get(name, (value, value))
            limits[name] = (min(low, value), max(high, value))
    return found


def sizes(row: Row) -> dict[str, float]:
    """What a calibrated range is kept of."""
    return {
        "hidden": float(row.work.model.hidden),
        "sequence": float(row.work.batch.seq),
        "devices": float(row.plan.world_size),
        "tokens of a micro-batch": float(row.plan.micro_batch * row.work.batch.seq),
    }


def render(rows: Sequence[Row], constants: Sequence[Constant], spread: Spread) -> str:
    """The generated part of :mod:`strategies.calibrated`."""
    runs: dict[Key, int] = defaultdict(int)
    for row in rows:
        runs[key_of(row)] += 1
    errors = {
        "seen": error(spread.seen.values()),
        "family left out": error(unseen(rows, spread).values()),
        "tenth left out": error(spread.folds.values()),
    }
    lines = [MARK, f"ROWS = {len(rows)}", "CONSTANTS: tuple[Constant, ...] = ("]
    lines += [f"    Constant{tuple(c._replace(value=float(f'{c.value:.4g}')))!r}," for c in constants]
    lines += [")", "RUNS: dict[tuple[str, str, str], int] = {"]
    lines += [f"    {key!r}: {runs[key]}," for key in sorted(runs)]
    lines += ["}", "BANDS: dict[str, tuple[float, float]] = {"]
    lines += [f"    {kind!r}: ({low:.4f}, {high:.4f})," for kind, (low, high) in bands(rows, spread).items()]
    lines += ["}", "RANGES: dict[str, dict[str, tuple[float, float]]] = {"]
    for name, limits in sorted(ranges(rows).items()):
        lines += [f"    {name!r}: {{", *(f"        {key!r}: {value!r}," for key, value in limits.items()), "    },"]
    lines += ["}", "ERRORS: dict[str, tuple[float, float]] = {"]
    lines += [f"    {name!r}: ({mape:.4f}, {median:.4f})," for name, (mape, median) in errors.items()]
    return "\n".join([*lines, "}", ""]).replace("'", '"')


def error(logs: Iterable[float]) -> tuple[float, float]:
    """Mean and median of the absolute relative error."""
    sizes_ = sorted(abs(math.exp(-log) - 1.0) for log in logs)
    return sum(sizes_) / len(sizes_), sizes_[len(sizes_) // 2]


def report(rows: Sequence[Row], constants: Sequence[Constant], spread: Spread) -> str:
    """Number of constants and errors, in words."""
    lines = [f"{len(constants)} constants, {len(rows)} rows"]
    for constant in constants:
        edge = min(constant.value / constant.least, constant.most / constant.value) < 1.01
        lines.append(
            f"  {' '.join(constant[:4]):32} {constant.value:<10.4g}" + (" AT THE END OF ITS RANGE" if edge else "")
        )
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[f"{row.family} {key_of(row)[0]}" + ("" if row.dense else " experts")].append(row)
    lines.append(f"{'MAPE / median':58} {'seen':>14} {'family out':>14} {'tenth out':>14}")
    for name, members in [*sorted(families.items()), ("all", list(rows))]:
        pairs = [error(part[row.id] for row in members) for part in spread]
        lines.append(f"{name:52} {len(members):5} " + " ".join(f"{m:7.1%}/{d:6.1%}" for m, d in pairs))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print, and with ``--write`` rewrite the generated part of :mod:`strategies.calibrated`."""
    parser = argparse.ArgumentParser(prog="python -m launcher.calibration.fit", description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path, default=FITTED_ROWS, help="CSV file of published runs")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TARGET.name}")
    options = parser.parse_args(arguments)
    rows = usable(read_rows(options.runs).rows)
    constants = fit(rows)
    spread = cross_validate(rows, constants)
    print(report(rows, constants, spread))
    if options.write:
        kept = TARGET.read_text(encoding="utf-8").partition(MARK)[0]
        TARGET.write_text(kept + render(rows, constants, spread), encoding="utf-8")
        print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
