"""Which gang may commit, and which checkpoints count: what tells the gangs of a run apart. No torch, no numpy.

Beside the steps, the controller keeps two records of each gang that follows another one, both created exclusively::

    fences/
        e0002-a0003.fence.json     made before anybody looks for where the gang begins: older gangs commit nothing more
        e0002-a0003.branch.json    made when that is decided, before any of its ranks exists: what it goes on from
        ballast                    thrown overboard where a full file system has no room for them

Whoever commits looks for a higher fence before and after: what was committed without meeting one was there when the
successor looked. What slipped in between the two looks, or was listed from a stale cache, is not taken back, for the
successor may have chosen it; whether it counts is a question to the branch alone, which has one answer for everybody
and for ever, whenever and by whatever clock it was written. So it is with all that a gang that was cut off brings to
its end: unless the run has gone on from there, it is not of the run's history.

One order for all who ask (:func:`in_order`), for checkpoints on disk as for generations in memory: of what counts,
the youngest gang's first, and of one gang the highest step.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jobs.checkpoint.claim import require_ours
from jobs.checkpoint.errors import FULL, CheckpointConflict, storage_error
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.storage import storage_of
from jobs.location import Location, Url
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError, StorageError

FOLDER = "fences"
BALLAST_BYTES = 1 << 16
_RECORD = re.compile(r"e(\d{4,})-a(\d{4,})\.(fence|branch)\.json")
_LOOKS = 5  # of which each may meet a record that has just made way for a newer one

Row = tuple[int, int, int]
"""A state of the run: step, epoch, attempt."""


class State(Protocol):
    """What has a place in the order."""

    @property
    def step(self) -> int:
        """Optimizer steps that it contains."""

    @property
    def token(self) -> Token:
        """Who made it."""


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """What a gang goes on from.

    Attributes:
        epoch: Of its token.
        attempt: Of its token.
        history: Of earlier gangs whose work it contains, the last state of each that it does, youngest first; the first
            is the one that it begins with. Those of which nothing was kept may be left out.
        passed: States that it would rather have begun with, and that could not be had then.
        finishing: What the gang before has on its way to the disk may still be committed, as far as it is history:
            every node of it has answered since, so that none was cut off.
    """

    epoch: int
    attempt: int
    history: tuple[Row, ...] = ()
    passed: tuple[Row, ...] = ()
    finishing: bool = False

    @property
    def token(self) -> Token:
        """The gang."""
        return Token(self.epoch, self.attempt)

    def counts(self, state: State) -> bool:
        """Whether a state is of the history of this gang, or was made by it or after it."""
        if state.token >= self.token:
            return True
        return any(state.token == (epoch, attempt) and state.step <= step for step, epoch, attempt in self.history)

    def lets_finish(self, state: State) -> bool:
        """Whether the state may still be committed although this gang has followed its own."""
        return self.finishing and self.counts(state) and state.token == self.history[0][1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Debt:
    """The records of a gang that has begun while the store did not answer: it commits nothing before they are laid.

    What they say was settled when it began, so that it does not matter who lays them, when, or how often.

    Attributes:
        owner: See :func:`raise_fence`.
        branch: What it goes on from.
        claim: The run and the owner that the place must name (:mod:`jobs.checkpoint.claim`); empty for a run's own
            folder.
    """

    owner: str
    branch: Branch
    claim: Mapping[str, str] = field(default_factory=dict)


def pay(root: Location, debt: Debt) -> None:
    """Lay the records that are owed.

    Raises:
        CheckpointConflict: Another gang has begun meanwhile; this one commits nothing.
        ResumeRefused: Another run keeps its checkpoints there.
        StorageError: They cannot be written.
    """
    if debt.claim:
        require_ours(root, run=debt.claim["run"], owner=debt.claim["owner"])
    raise_fence(root, debt.branch.token, owner=debt.owner)
    begin(root, debt.branch)


def owed(path: Path, token: Token) -> Debt | None:
    """What a gang owes; None for nothing. What was left there for another gang of its number is not its own.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        found = from_json(Debt, json.loads(path.read_text()), where=str(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        raise StorageError(f"{path} cannot be read.", why=str(error)) from error
    return found if found.branch.token == token else None


def in_order(states: Iterable[S], branch: Branch | None) -> list[S]:
    """Those that count, best first.

    What was passed over, and can be had again, counts until the gang that passed it over has something to show.

    Args:
        states: In any order.
        branch: The newest one that is known; None where there has been one gang only, or no controller.
    """
    found = sorted(states, key=lambda one: (one.token, one.step), reverse=True)
    if branch is None:
        return found
    passed = () if found and found[0].token >= branch.token else branch.passed
    return [one for one in found if branch.counts(one) or (one.step, *one.token) in passed]


def why_not(state: State, branch: Branch | None) -> str:
    """Why a state that :func:`in_order` leaves out does not count, for people."""
    if branch is None:
        return ""
    if (state.step, *state.token) in branch.passed:
        return f"it could not be had when {branch.token} began, which has gone on from an older one"
    kept = [step for step, *token in branch.history if tuple(token) == state.token]
    if kept:
        return f"{state.token} was replaced: the run has gone on from its step {kept[0]}"
    return f"{branch.token} has gone on without anything of {state.token}"


def raise_fence(root: Location, token: Token, *, owner: str) -> None:
    """From here on no gang older than ``token`` commits anything. Does nothing if we have done it before.

    Args:
        root: Folder of all checkpoints of the run.
        token: The gang that will be next.
        owner: What identifies the controller among all that ever were.

    Raises:
        CheckpointConflict: Another controller has fenced this one out.
        StorageError: It cannot be made.
    """
    higher = highest(root)
    if higher is not None and higher > token:
        raise _conflict(f"The gang {token} cannot begin.", f"a later one, {higher}, has begun")
    _create(root, token, "fence", json.dumps({"owner": owner}).encode() + b"\n")


def begin(root: Location, branch: Branch) -> None:
    """Lay down what a gang goes on from, before any of its ranks exists.

    Raises:
        CheckpointConflict: Another controller has laid down something else for the same gang.
        StorageError: It cannot be written.
    """
    _create(root, branch.token, "branch", json.dumps(to_json(branch)).encode() + b"\n")
    take_ballast(root)


def take_ballast(root: Location) -> None:
    """Reserve room for the records of the next gang while there is some: it may begin because the disk is full."""
    if isinstance(root, Url):
        return
    with contextlib.suppress(OSError):
        storage = storage_of(root)
        if _ballast(root).name not in storage.names(root / FOLDER):
            storage.create(_ballast(root), [bytes(BALLAST_BYTES)])


def forget_older(root: Location) -> None:
    """Delete the records that newer ones have made superfluous. Raises OSError."""
    records = _records(root)
    newest = max((token for token, kind in records if kind == "branch"), default=None)
    for token, kind in records:
        if newest is not None and token < newest:
            storage_of(root).delete(_path(root, token, kind))


def highest(root: Location) -> Token | None:
    """The youngest gang that was announced; None if there is no fence. Raises StorageError."""
    return max((token for token, _ in _listed(root)), default=None)


def current(root: Location, known: Branch | None = None) -> Branch | None:
    """The branch that decides what counts.

    Args:
        root: Folder of all checkpoints of the run.
        known: What the event log tells of the newest gang, where one is at hand: the record may have been made while
            another file system was mounted here.

    Returns:
        None if there is no fence at all: of a run that has had one gang, or none that a controller has fenced.

    Raises:
        StorageError: It cannot be read.
    """
    for left in range(_LOOKS - 1, -1, -1):
        records = _listed(root)
        newest = max((token for token, kind in records if kind == "branch"), default=None)
        if known is not None and records and (newest is None or known.token > newest):
            return known
        if newest is None:
            return None
        try:
            return _read(root, newest)
        except FileNotFoundError as error:
            if not left:
                raise storage_error("read what a gang goes on from", root / FOLDER, error) from error
        except OSError as error:
            raise storage_error("read what a gang goes on from", root / FOLDER, error) from error
    raise AssertionError("unreachable")


def refuse_if_fenced(place: Place[Any]) -> None:
    """Refuse a commit of a gang that was replaced.

    Raises:
        CheckpointConflict: A later gang was announced, and it does not let this one finish.
        StorageError: The fences cannot be read.
    """
    higher = highest(place.root)
    if higher is None or higher <= place.token:
        return
    branch = current(place.root)
    if branch is not None and branch.token == higher and branch.lets_finish(place):
        return
    raise _conflict(f"The gang {place.token} may not commit step {place.step}.", f"a later gang, {higher}, has begun")


def _create(root: Location, token: Token, kind: str, content: bytes) -> None:
    storage, path = storage_of(root), _path(root, token, kind)
    try:
        try:
            try:
                storage.create(path, [content])
            except OSError as error:
                if error.errno not in FULL:
                    raise
                storage.delete(_ballast(root))
                storage.create(path, [content])
            storage.settle(path.parent, root)
        except FileExistsError:
            if storage.read(path) != content:
                raise _conflict(f"The gang {token} cannot begin.", "another controller has used its number") from None
    except OSError as error:
        raise storage_error("fence earlier gangs", path, error) from error


def _conflict(what: str, why: str) -> CheckpointConflict:
    return CheckpointConflict(what, why=why, hint="Nothing is lost; this one was replaced and ends.")


def _path(root: Location, token: Token, kind: str) -> Location:
    return root / FOLDER / f"{token}.{kind}.json"


def _ballast(root: Location) -> Location:
    return root / FOLDER / "ballast"


def _listed(root: Location) -> list[tuple[Token, str]]:
    try:
        return _records(root)
    except OSError as error:
        raise storage_error("list the fences", root / FOLDER, error) from error


def _records(root: Location) -> list[tuple[Token, str]]:
    matches = (_RECORD.fullmatch(name) for name in storage_of(root).names(root / FOLDER))
    return [(Token(int(match[1]), int(match[2])), match[3]) for match in matches if match]


def _read(root: Location, token: Token) -> Branch:
    path = _path(root, token, "branch")
    try:
        return from_json(Branch, json.loads(storage_of(root).read(path)), where=str(path))
    except (ValueError, ConfigError) as error:
        raise StorageError(
            f"{path} cannot be understood.",
            why=str(error),
            hint="Delete it: phalanx resume finds in the event log what it said.",
        ) from error
