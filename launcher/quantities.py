"""Predicted numbers for people, each with its unit and no more digits than a prediction deserves. Pure strings."""

from __future__ import annotations

import math
from collections.abc import Callable


def digits(number: float, significant: int = 3) -> str:
    """A plain number with that many significant digits, never in powers of ten: ``0.0123``, ``4.52``, ``1,230``."""
    if not math.isfinite(number):
        return "unlimited"
    if number == 0:
        return "0"
    decimals = max(0, significant - 1 - math.floor(math.log10(abs(number))))
    return f"{number:,.{decimals}f}"


def span(seconds: float) -> str:
    """A duration from nanoseconds to years: ``17.3 ms``, ``23.1 s``, ``42 min``, ``9.5 h``, ``33 d``."""
    for unit, factor, until in (("us", 1e-6, 1e-3), ("ms", 1e-3, 1.0), ("s", 1.0, 600.0), ("min", 60.0, 7200.0)):
        if seconds < until:
            return f"{digits(seconds / factor)} {unit}"
    if seconds < 2 * 86400:
        return f"{digits(seconds / 3600)} h"
    return days(seconds / 86400)


def days(number: float) -> str:
    """Days, or years where there are many: ``0.35 d``, ``33.1 d``, ``36.2 years``."""
    if not math.isfinite(number):
        return "never"
    if number < 1 / 24:
        return span(number * 86400)
    return f"{digits(number)} d" if number < 1000 else f"{digits(number / 365.25)} years"


def extent(low: float, high: float, words: Callable[[float], str]) -> str:
    """``80.2 to 140 d``, ``$1.2 M to $1.9 M``: a range, the unit once if both ends have the same."""
    first, last = words(low), words(high)
    number, _, unit = first.rpartition(" ")
    once = unit.isalpha() and not first.startswith("$") and last.endswith(f" {unit}")
    return f"{number if once else first} to {last}"


def percent(fraction: float, decimals: int = 1) -> str:
    """``12.3 %``; small ones are not rounded to nothing."""
    if 0 < fraction < 0.5 * 10 ** (-2 - decimals):
        return f"< {10**-decimals:.{decimals}f} %"
    if 1 - 0.5 * 10 ** (-2 - decimals) <= fraction < 1:
        return f"> {100 - 10**-decimals:.{decimals}f} %"
    return f"{100 * fraction:.{decimals}f} %"


def gain(fraction: float) -> str:
    """``+7 %``."""
    return f"{100 * fraction:+.0f} %" if abs(fraction) >= 0.095 else f"{100 * fraction:+.1f} %"


def dollars(amount: float) -> str:
    """``$63.2 M``."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= factor:
            return f"${digits(amount / factor)} {unit}"
    return f"${digits(amount)}"


def storage(number: float | None) -> str:
    """Bytes with three digits, in powers of ten: ``61.2 GB``."""
    if number is None or not math.isfinite(number):
        return "unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{digits(number / factor)} {unit}"
    return f"{number:.0f} B"
