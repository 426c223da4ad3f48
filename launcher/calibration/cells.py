"""The cells of one line of a table of runs: typed, with every problem noted instead of raised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from launcher.calibration import facts
from launcher.typed import Problem
from strategies.errors import did_you_mean


class Cells:
    """One line.

    A getter that finds nonsense notes a :class:`Problem` and returns a harmless value, so that the rest of the line is
    still looked at.
    """

    def __init__(self, raw: Mapping[str, str], line: int) -> None:
        """Wrap the cells of line number ``line``."""
        self.raw = raw
        self.line = line
        self.problems: list[Problem] = []
        self.assumed: list[str] = []

    def text(self, column: str) -> str:
        """The cell as it is; empty where the column does not exist."""
        return self.raw.get(column, "")

    def name(self, column: str) -> str:
        """A cell that must not be empty."""
        value = self.text(column)
        if not value:
            self._note(column, "empty", "every run has a name of its own")
        return value

    def choice(self, column: str, known: Sequence[str]) -> str:
        """One of a few words."""
        value = self.text(column).lower()
        if value not in known:
            self._note(column, f"'{value}' is not a known value", did_you_mean(value, known))
            return known[0]
        return value

    def number(self, column: str) -> float | None:
        """A positive number, or None for an empty cell."""
        value = self.text(column)
        if not value:
            return None
        try:
            number = float(value)
        except ValueError:
            self._note(column, f"'{value}' is not a number", "a positive number, or empty")
            return None
        if not (math.isfinite(number) and number > 0):
            self._note(column, f"{value} is not above 0", "a positive number, or empty")
            return None
        return number

    def whole(self, column: str, least: int = 1) -> int | None:
        """A whole number of at least ``least``, or None for an empty cell."""
        value = self.text(column)
        if not value:
            return None
        try:
            number = float(value)
        except ValueError:
            self._note(column, f"'{value}' is not a whole number", f"{least} or more")
            return None
        if not math.isfinite(number) or number != int(number) or number < least:
            near = max(least, round(number)) if math.isfinite(number) else least
            self._note(column, f"{value} is not a whole number of {least} or more", f"nearest: {near}")
            return None
        return int(number)

    def flag(self, column: str) -> bool:
        """``y`` or ``n``; an empty cell is ``n``."""
        value = self.text(column).lower()
        if value not in ("y", "n", "yes", "no", ""):
            self._note(column, f"'{value}' is neither y nor n", "y or n")
        return value.startswith("y")

    def step_s(self) -> float | None:
        """Seconds per step: measured, or from the tokens per second and device."""
        step_s, rate = self.number("step_time_s"), self.number("tok_s_gpu")
        batch, seq, devices = self.whole("global_batch"), self.whole("seq"), self.whole("gpus")
        self.problems = [p for i, p in enumerate(self.problems) if p not in self.problems[:i]]
        if step_s is None and rate and batch and seq and devices:
            return batch * seq / (rate * devices)
        return step_s

    def peak_bytes(self) -> float | None:
        """Measured memory; None where the source itself calls it implausible."""
        peak, notes = self.number("peak_mem_gb"), self.text("notes")
        if peak is None or facts.memory_is_doubtful(notes):
            return None
        return peak * facts.memory_unit(notes)

    @property
    def allocated(self) -> bool:
        """The memory is what tensors took, not what the process held."""
        return facts.memory_is_allocated(self.text("notes"))

    def assume(self, what: str) -> None:
        """Note a choice that the line left open."""
        self.assumed.append(what)

    def _note(self, column: str, message: str, hint: str) -> None:
        problem = Problem(key=f"line {self.line}, column {column}", message=message, hint=hint)
        if problem not in self.problems:
            self.problems.append(problem)
