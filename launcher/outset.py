"""Where the next attempt begins, whether the store of the checkpoints answers or not.

While it answers: what :func:`launcher.origin.look` finds, laid down before any rank exists. A store that is away must
not end what needs nothing of it: where the nodes hold a generation that is as new as all that the log knows of, the
gang begins with that, and owes the store the records that keep gangs apart (:class:`jobs.checkpoint.fence.Debt`). What
they say is settled by then, and is the log's: only the run's own history up to that generation counts, whatever a gang
that was cut off commits meanwhile. They are laid as soon as the store answers, by the controller, or by whoever commits
first for the new gang: nothing of it is committed before.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.checkpoint import CheckpointConflict
from jobs.checkpoint.errors import is_full, storage_error
from jobs.checkpoint.fence import Branch, Debt, owed, pay
from jobs.checkpoint.layout import Token
from jobs.spec import JobSpec
from launcher import lineage, origin
from launcher.ending import in_a_line
from launcher.errand import Errand, Silent
from launcher.logbook import Fenced
from launcher.memory_tier import MemoryTier
from launcher.origin import Look, NothingLeft, NothingOlder
from launcher.progress import OnDisk, ResumePoint
from launcher.recovery import FailureKind
from launcher.run import Run
from launcher.store import RunStore, dump, write_atomic
from strategies.errors import PhalanxError, StorageError
from strategies.schedule import Skip

ANSWER_S = 3.0  # a store that is well has told all that there is by then
PAY_EVERY_S = 5.0
_NOT_THERE = "the place of the checkpoints is not there, or is another run's"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """Where an attempt begins.

    Attributes:
        point: The state.
        passed: The checkpoints that are passed over for it, and why; that belongs on record when it is gone on from.
        unfenced: Why the store is owed a fence, for people; "" where it is not.
        skip: Samples that it leaves out from there on, after a rollback.
    """

    point: ResumePoint
    passed: Mapping[str, str] = field(default_factory=dict)
    unfenced: str = ""
    skip: Skip | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What the event log keeps of it beside the point."""
        told = {"unfenced": self.unfenced, "skip": self.skip}
        return {name: value for name, value in told.items() if value}


class NotYet(NothingLeft):
    """The store has neither answered nor failed."""


class Outset:
    """Finds beginnings, and pays what is owed for them.

    Args:
        store: The run.
        memory: What the nodes hold.
        answer_s: How long to wait for the store.
        pay_every_s: How often to try to pay.
    """

    def __init__(
        self, store: RunStore, memory: MemoryTier, *, answer_s: float = ANSWER_S, pay_every_s: float = PAY_EVERY_S
    ) -> None:
        self._store, self._memory, self._answer_s, self._pay_every_s = store, memory, answer_s, pay_every_s
        self._errand = Errand()
        self._begun: tuple[Branch, Beginning] | None = None  # may be on record: it stays
        self._debt: Debt | None = None
        self._paying = False  # a payment is on its way
        self._pay_at = 0.0

    def find(self, job: JobSpec, run: Run, epoch: int, up: Collection[str]) -> Beginning:
        """The newest state that can be had; it is laid down, or owed.

        Args:
            job: What the attempt will do.
            run: The run as its log tells it.
            epoch: The controller's.
            up: Nodes that answer.

        Raises:
            NothingLeft: As :func:`launcher.origin.look`; or nothing is known while the store does not answer.
            Fenced: Another controller has taken over.
            StorageError: There is no room for a fence.
        """
        token = Token(epoch, len(run.attempts) + 1)
        self._debt, self._paying = None, False  # what the attempt before still owes does not matter any more
        if self._begun is not None and self._begun[0].token == token:
            return self._lay_down(*self._begun)
        there = run.attempt is not None and set(run.attempt.nodes) <= set(up)
        try:
            seen = self._look(job, run, token)
        except NothingOlder:
            raise
        except (Silent, NothingLeft, StorageError) as error:
            why = _silence(error)
            point = self._remembered(job, run)
            if point is None:
                raise (NotYet if isinstance(error, Silent) else NothingLeft)(why) from error
            begins = Beginning(point=point, unfenced=why, skip=run.rollback.skip(job, point.step))
            return self._owe(_branch_of(run, token, point, there), begins)
        begins = Beginning(point=seen.point, passed=seen.passed, skip=run.rollback.skip(job, seen.point.step))
        if seen.fenced:
            over = run.absent | seen.passed.keys()
            branch = lineage.following(run, token, seen.point.path, kept=seen.writers, passed=over, finishing=there)
            self._begun = branch, begins
            return self._lay_down(branch, begins)
        if seen.point.memory is None:
            return begins
        return self._owe(_branch_of(run, token, seen.point, there), replace(begins, unfenced=_NOT_THERE))

    def _look(self, job: JobSpec, run: Run, token: Token) -> Look:
        better, script = self._memory.better(run, job), job.kind != "pretrain"
        return self._errand.run(
            (token, run.rejected, self._memory.contents()),
            lambda: origin.look(self._store, run, token, script=script, better=better),
            self._answer_s,
        )

    def _remembered(self, job: JobSpec, run: Run) -> ResumePoint | None:
        """A state in memory, if nothing newer is known to have been on disk.

        None where the last checkpoint of the run could not be written for as long as it is tried: with the same state
        and no store it would be so again.
        """
        if run.attempt is None or run.attempt.failure == FailureKind.UNSAVED:
            return None
        point = self._memory.better(run, job)(OnDisk(point=ResumePoint(), branch=lineage.of(run)))
        return point if point.memory is not None and point.step >= origin.promised(run) else None

    def _lay_down(self, branch: Branch, begins: Beginning) -> Beginning:
        try:
            self._errand.run(("lay down", branch), lambda: origin.lay_down(self._store, branch), self._answer_s)
        except (Silent, StorageError) as error:
            why = _silence(error)
            if begins.point.memory is None:
                raise (NotYet if isinstance(error, Silent) else NothingLeft)(why) from error
            return self._owe(branch, replace(begins, unfenced=why))
        return begins

    def _owe(self, branch: Branch, begins: Beginning) -> Beginning:
        store = self._store
        claim = {"run": store.name, "owner": store.owner} if store.paths.pointer.exists() else {}
        self._debt = Debt(owner=origin.owner(), branch=branch, claim=claim)
        self._pay_at = time.monotonic() + self._pay_every_s
        return begins

    def sign(self, path: Path) -> None:
        """Leave what is owed where the ranks of the attempt find it; nothing if nothing is.

        A controller that fell before the attempt was on record may have left there what its own would have owed.

        Raises:
            StorageError: It cannot be left, or taken away.
        """
        if self._debt is not None:
            write_atomic(path, dump(self._debt))
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error("take away what is owed no more", path, error) from error

    def inherit(self, path: Path, token: Token) -> None:
        """Pay from now on what a gang owes that was begun by a predecessor.

        Args:
            path: Where :meth:`sign` has left it.
            token: The gang.

        Raises:
            StorageError: It cannot be read.
        """
        self._debt, self._paying, self._pay_at = owed(path, token), False, time.monotonic()

    def settle(self) -> dict[str, Any]:
        """Pay what is owed, if the store answers; returns what is news about that, for the log. Never waits.

        Raises:
            Fenced: Another controller has taken over.
        """
        debt = self._debt
        if debt is None or (not self._paying and time.monotonic() < self._pay_at):
            return {}
        self._paying = True
        try:
            self._errand.run(("pay", debt.branch), lambda: pay(self._store.paths.checkpoints, debt), 0.0)
        except Silent:
            return {}
        except CheckpointConflict as error:
            raise Fenced from error
        except PhalanxError:
            self._paying, self._pay_at = False, time.monotonic() + self._pay_every_s
            return {}
        self._debt = None
        return {"reason": "the store of the checkpoints answers again, and earlier gangs are fenced off there"}


def _branch_of(run: Run, token: Token, point: ResumePoint, there: bool) -> Branch:
    """What the log alone knows: who of its history has left something in the store is not asked."""
    everybody = [Token(one.epoch, one.number) for one in run.attempts]
    return lineage.following(run, token, point.path, kept=everybody, passed=run.absent, finishing=there)


def _silence(error: Exception) -> str:
    """Why there is no answer, in a sentence; raises what no waiting will mend."""
    if isinstance(error, StorageError):
        if is_full(error):
            raise error
        return f"the checkpoints cannot be looked at: {in_a_line(error)}"
    return f"the store of the checkpoints {error}" if isinstance(error, Silent) else str(error)
