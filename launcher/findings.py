"""All that is wrong, collected, so that whoever has mended one mistake does not meet the next only then. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from strategies.errors import ConfigError, PhalanxError, PlanInfeasible

T = TypeVar("T")
R = TypeVar("R")


class Findings:
    """What is wrong, in the order in which it was found; a mistake that two checks meet is told once."""

    def __init__(self) -> None:
        self._errors: list[PhalanxError] = []

    def __bool__(self) -> bool:
        """Whether anything is wrong."""
        return bool(self._errors)

    def of(self, step: Callable[[], T]) -> T | None:
        """What a step yields; None where it is refused, which is noted."""
        try:
            return step()
        except PhalanxError as error:
            self.add(error)
            return None

    def add(self, error: PhalanxError) -> None:
        """Note an error."""
        self._errors.append(error)

    def note(self, lines: Iterable[object]) -> None:
        """Note problems of the configuration, a line each."""
        self._errors += [ConfigError(str(line), problems=(str(line),)) for line in lines]

    @property
    def lines(self) -> list[str]:
        """Everything, one problem each."""
        return list(dict.fromkeys(line for error in self._errors for line in lines_of(error)))

    def refuse(self) -> None:
        """Raise what was found, if anything was: see :meth:`error`."""
        if self._errors:
            raise self.error()

    def error(self) -> PhalanxError:
        """What was found as one error: the only one itself; of their kind, or a ConfigError for several kinds."""
        return self._errors[0] if len(self._errors) == 1 else everything(self.lines, self._kind())

    def _kind(self) -> type[PhalanxError]:
        kinds = {type(error) for error in self._errors}
        kind = kinds.pop()
        return ConfigError if kinds or kind is PlanInfeasible else kind


def everything(lines: Sequence[str], kind: type[PhalanxError] = ConfigError) -> PhalanxError:
    """All that is wrong as one error."""
    if len(lines) == 1:
        return kind(lines[0], problems=lines)
    told = "\n".join(f"  - {line}" for line in lines)
    return kind(f"The run has {len(lines)} problems:\n{told}", hint="Nothing was written.", problems=lines)


def lines_of(error: PhalanxError) -> list[str]:
    """The problems that an error tells of."""
    if isinstance(error, PlanInfeasible):
        return [str(one) for one in error.violations] or [error.what]
    if error.problems:
        return list(error.problems)
    parts = (error.what, error.why and f"({error.why})", error.hint)
    return [" ".join(part for part in parts if part).replace("\n", "\n    ")]


def common(readings: Sequence[T], judge: Callable[[T], Sequence[R]]) -> list[R]:
    """What is found wrong in every reading of something that can be read in several ways.

    The later ones are judged only as long as something is left.
    """
    if not readings:
        return []
    found = list(judge(readings[0]))
    for other in readings[1:]:
        if not found:
            break
        there = judge(other)
        found = [one for one in found if one in there]
    return found
