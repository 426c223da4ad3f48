"""Every error a user can meet, in one tree.

::

    PhalanxError            1    internal: our own bug unless a subclass says otherwise
    ├── ConfigError         2    usage, unknown key, wrong type, inconsistent values
    ├── PlanInfeasible      3    the plan breaks rules or does not fit the cluster; carries every violation
    ├── ClusterError        4    cluster unreachable, authentication refused, nodes missing
    ├── NotFound            5    no such run, rank, attempt or checkpoint
    ├── ResumeRefused       6    the change would make another run, or another controller owns it
    ├── StorageError        7    run directory, checkpoint or corpus cannot be read or written
    ├── RunFailed         100    a followed run ended in failure
    ├── RunCancelled      103    a followed run was cancelled
    ├── DrillFailed       104    a fault of a drill did not fire, or its run did not end as it must
    ├── DrillIncomplete   105    some faults of a drill cannot be rehearsed on this machine; the others passed
    └── Interrupted       130    a person or a signal has ended the command

Each error says *what* happened, *why* (with the numbers) and *what to do next*. The number is the exit code of the
command, so that scripts can tell the cases apart.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar


class PhalanxError(Exception):
    """Base of all errors that are shown to a user without a traceback.

    Args:
        what: One sentence: what went wrong, with the names and numbers involved.
        why: The reason, if it is not obvious from ``what``.
        hint: What the user can do next, as an imperative or a command to type.
        problems: Where it tells of several, each of them.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)


class ConfigError(PhalanxError):
    """Usage or configuration is invalid."""

    exit_code = 2


class ClusterError(PhalanxError):
    """The cluster cannot be reached, refuses us, or lost what the run needs."""

    exit_code = 4


class NotFound(PhalanxError):
    """The named thing does not exist."""

    exit_code = 5


class ResumeRefused(PhalanxError):
    """Resuming is refused, because it would not be the same run or because the run is taken."""

    exit_code = 6


class StorageError(PhalanxError):
    """Durable storage cannot be read or written as needed."""

    exit_code = 7


class RunFailed(PhalanxError):
    """A run that was followed ended in failure."""

    exit_code = 100


class RunCancelled(PhalanxError):
    """A run that was followed was cancelled."""

    exit_code = 103


class DrillFailed(PhalanxError):
    """A fault of a drill did not fire, or its run did not end as it must."""

    exit_code = 104


class DrillIncomplete(PhalanxError):
    """Some faults of a drill cannot be rehearsed on this machine; the others passed."""

    exit_code = 105


class Interrupted(PhalanxError):
    """A person or a signal has ended the command."""

    exit_code = 130


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """One broken rule of a plan.

    Attributes:
        rule: Name of the rule, stable for scripts (for example ``heads_divisible_by_tp``).
        message: What is wrong, with the numbers of the identity spelled out.
        hint: The nearest legal values, or the change that mends it.
    """

    rule: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}; {self.hint}" if self.hint else f"{self.rule}: {self.message}"


class PlanInfeasible(PhalanxError):
    """A plan breaks one or more rules; all of them are listed."""

    exit_code = 3

    def __init__(self, violations: Sequence[Violation], *, what: str = "", hint: str = "") -> None:
        self.violations = tuple(violations)
        count = len(self.violations)
        super().__init__(
            what or f"The plan breaks {count} rule{'s' if count != 1 else ''}:",
            hint=hint,
        )

    def __str__(self) -> str:
        lines = [self.what, *(f"  - {violation}" for violation in self.violations)]
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known names.

    Args:
        word: What the user typed.
        known: The names that would have been accepted.

    Returns:
        ``"Did you mean 'tp'? Known: ..."``, with the suggestion left out when nothing is near.
    """
    names = sorted(set(known))
    cutoff = 0.55 if len(word) > 3 else 0.5  # one letter of two may be wrong: tq for tp
    near = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    suggestion = f"Did you mean '{near[0]}'? " if near else ""
    return f"{suggestion}Known: {', '.join(names)}."
