"""When a run ends that failures delay: quantiles of its finish, in closed form.

A run is a renewal process of cycles, from one recovery to the next (:mod:`strategies.failures`). ``U`` seconds of work
take ``U / goodput`` on average; the variance is the number of cycles times the variance of (wall clock - slowness *
progress) over one (W. L. Smith, "Regenerative stochastic processes", 1955: the central limit of cumulative processes).
Quantiles: the chance that nothing fails, and else a gamma distribution with the remaining moments, by Wilson and
Hilferty (1931).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from strategies.failures import DAY_S, LEAST, Process, Shares, Standby, outwaited, shares, shortage


def finish_days(
    what: Process, standby: Standby | None, work_s: float, chances: Sequence[float] = (0.5, 0.9)
) -> tuple[float, ...]:
    """Days after which ``work_s`` seconds of work are done with these chances, the speed being known exactly."""
    if not what.rate:
        return (work_s / DAY_S,) * len(chances)
    parts = shares(what, standby)
    smooth_s, mean_s = work_s * (1 + what.stall), work_s / max(LEAST, parts.goodput)
    cycles = mean_s * what.rate * parts.staffed * parts.running
    variance = cycles * _cycle_variance(what, standby, parts, mean_s / smooth_s)
    quiet = math.exp(-what.rate * smooth_s)
    delays = (_delay(mean_s - smooth_s, variance, quiet, chance) for chance in chances)
    return tuple((smooth_s + delay) / DAY_S for delay in delays)


def finish_range(
    what: Process, standby: Standby | None, work_s: float, spread: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float, float]:
    """Days until the end with a chance of 10, 50 and 90 %, by failures and by the error of the predicted step.

    The logarithm of the step is taken as normal, with the ends of its band as quantiles of 5 and 95 %, and independent
    of the failures; variances of logarithms add up. With ``d`` the quantiles by failures alone::

        ln(days_90 / days_50) = sqrt(ln(d_90 / d_50)^2 + (z_90 / z_95 * ln(high / step))^2)

    and the same with ``d_50 / d_10`` and ``step / low`` for 10 %.

    Args:
        what: The failures.
        standby: What happens when a node is gone.
        work_s: Seconds of work.
        spread: Ends of the 90 % band of a step, as factors of the step; (1, 1) leaves the failures alone.
    """
    few, half, most = finish_days(what, standby, work_s, (0.1, 0.5, 0.9))
    one_sided = NormalDist().inv_cdf(0.9) / NormalDist().inv_cdf(0.95)
    faster, slower = (one_sided * abs(math.log(end)) for end in (min(1.0, spread[0]), max(1.0, spread[1])))
    early, late = math.hypot(math.log(half / few), faster), math.hypot(math.log(most / half), slower)
    return half * math.exp(-early), half, half * math.exp(late)


def _cycle_variance(what: Process, standby: Standby | None, parts: Shares, slowness: float) -> float:
    """Variance of wall clock minus ``slowness`` times progress over one cycle of running and recovering, in s^2.

    Progress is the exponential time of running, less the work lost. That is uniform between the overlapped write,
    before which the previous save counts, and an interval more.
    """
    short = shortage(what, standby)
    what = outwaited(what, short)
    mean, square, spread = 0.0, 0.0, ((slowness - 1) / what.rate) ** 2
    for share, interval_s, write_s, down_s in (
        (1 - what.correlated, what.memory_s, what.replica_s, what.recover_memory_s),
        (what.correlated, what.disk_s, what.write_s, what.recover_disk_s),
    ):
        if share:
            period_s, exposed = interval_s * (1 + what.stall), min(what.rate * down_s, 100.0)
            setback_s = slowness * (write_s + period_s / 2) + math.expm1(exposed) / what.rate
            mean += share * setback_s
            square += share * setback_s**2
            spread += share * (slowness * period_s) ** 2 / 12
            # a recovery that failures start over: Var = (exp(2 x) - 1 - 2 x exp(x)) / L^2
            spread += share * max(0.0, math.expm1(2 * exposed) - 2 * exposed * math.exp(exposed)) / what.rate**2
    waits_s = short.lost / (what.rate * max(1 - short.lost, LEAST))
    spread += max(0.0, short.moment_s2 - waits_s**2) / parts.running
    return spread + square - mean**2


def _delay(mean_s: float, variance: float, quiet: float, chance: float) -> float:
    """Quantile of a delay that is 0 with chance ``quiet`` and else gamma, with this mean and variance over all."""
    if chance <= quiet or mean_s <= 0:
        return 0.0
    some_s = mean_s / (1 - quiet)
    spread = max((variance + mean_s**2) / (1 - quiet) - some_s**2, 1e-12 * some_s**2)
    shape = some_s**2 / spread
    z = NormalDist().inv_cdf((chance - quiet) / (1 - quiet))
    return some_s * max(0.0, 1 - 1 / (9 * shape) + z / (3 * math.sqrt(shape))) ** 3
