"""The disk tier behind the ranks: writes the parts of this node, and commits when every rank's part is durable.

The persister of rank 0's node coordinates: the others tell it what they have written, or why they could not. On the
first part that fails everybody withdraws what was written, and rank 0 learns the reason when it asks, once all have
told: then the same checkpoint may be tried again. What a manifest may yet name stays, until the next one is committed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.checkpoint.errors import CheckpointConflict, is_full
from jobs.checkpoint.fence import Debt, pay
from jobs.checkpoint.layout import Place, Token, place_of
from jobs.checkpoint.manifest import TrainerState
from jobs.checkpoint.parts import Part, Whole, arrived_before, commit_parts, retaken, withdraw_part, write_part
from jobs.checkpoint.retention import tidied
from jobs.location import Location, locate
from launcher.host.persist.shelf import Held, Shelf
from strategies.codec import from_json, to_json
from strategies.errors import PhalanxError, StorageError
from strategies.plan import ParallelPlan
from strategies.specs import ModelSpec

Tell = Callable[[Token, dict[str, Any]], None]
"""Sends a message to the coordinator of an attempt."""


@dataclass(slots=True, eq=False)
class Writing:
    """The part of one rank on its way to the disk.

    Attributes:
        held: The part.
        place: Where it goes.
        base: The last committed checkpoint.
        again: What was written of it before has failed.
        durable: Set once it is written, or has failed.
        released: Set once the commit may go on without asking its rank.
    """

    held: Held
    place: Place[Location]
    base: Place[Location] | None = None
    again: bool = False
    durable: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class Pending:
    """A checkpoint that is being made, as its coordinator sees it.

    Attributes:
        place: Where it goes.
        parts: What is durable, by rank.
        whole: What the manifest says beside its parts; None until rank 0 has handed it in.
        world: Number of parts; 0 until then.
        keep: Checkpoints to keep; 0 until then.
        debt: What its gang owes the store before it commits anything; None for nothing.
        again: It was tried before; its manifest may have arrived all the same.
        told: Ranks whose part is durable, or has failed.
        withdrawals: Deletions that are under way.
        committing: All parts are there, and the manifest is being written.
        done: What became of it: ``step``, ``path``, ``bytes``, ``written_bytes``, ``warning``; or ``error``.
    """

    place: Place[Location]
    parts: dict[int, Part] = field(default_factory=dict)
    whole: Whole | None = None
    world: int = 0
    keep: int = 0
    debt: Debt | None = None
    again: bool = False
    told: set[int] = field(default_factory=set)
    withdrawals: int = 0
    committing: bool = False
    done: dict[str, Any] | None = None

    @property
    def over(self) -> bool:
        """Whether nobody does anything for it any more."""
        if self.done is None or "error" not in self.done:
            return self.done is not None
        return len(self.told) == self.world and not self.withdrawals


class Flusher:
    """Writes parts in the background.

    Args:
        shelf: Where the parts are.
        root: Where all checkpoints of the run are.
        tell: How to reach the coordinator of an attempt.
    """

    def __init__(self, shelf: Shelf, root: Location, tell: Tell) -> None:
        self._shelf = shelf
        self._root = root
        self._tell = tell
        self._pending: dict[tuple[int, Token], Pending] = {}
        self._busy = 0

    def accept(self, held: Held, *, hold: bool, keep: int, base: str = "", again: bool = False) -> Writing:
        """Take on a sealed part; nobody overwrites it before it is written, which :meth:`start` begins.

        Args:
            held: The part.
            hold: It does not count before :attr:`Writing.released` is set.
            keep: Checkpoints to keep.
            base: Manifest of the last committed checkpoint; "" for none. What has not changed since is not written.
            again: It was tried before, and :meth:`outcome` has said that it failed.
        """
        place = Place(self._root, held.step, held.stream.info.token)
        writing = Writing(held, place, place_of(locate(base)) if base else None, again)
        if not hold:
            writing.released.set()
        self._shelf.pin(held)
        with self._shelf.changed:
            self._busy += 1
            if held.stream.info.rank == 0:
                pending = self._of(writing.place)
                debt = held.stream.info.about.get("debt")
                pending.debt = from_json(Debt, debt) if debt else None
                pending.whole, pending.world = _whole(held), held.stream.info.world
                pending.keep, pending.again = keep, again
        return writing

    def start(self, writing: Writing) -> None:
        """Begin to write what was accepted."""
        threading.Thread(target=self._write, args=(writing,), daemon=True, name="flush").start()

    def _write(self, writing: Writing) -> None:
        held, info = writing.held, writing.held.stream.info
        report: dict[str, Any]
        try:
            part = retaken(writing.place, info.rank) if writing.again else None
            part = part or write_part(
                writing.place,
                info.rank,
                held.stream.image.pieces(held.buffer.view),
                held.record["rank_state"],
                int(held.record["trainer"]["optimizer_steps"]),
                base=writing.base,
            )
            report = {"part": to_json(part)}
        except Exception as error:  # whatever it is: the others wait for news of this part
            report = {"failure": describe(error)}
        finally:
            self._shelf.unpin(held)
            writing.durable.set()
        writing.released.wait()
        message = {"op": "part", "token": info.token, "step": held.step, "rank": info.rank} | report
        try:
            self._tell(info.token, message)
        finally:
            self._settled()

    # -- the coordinator -------------------------------------------------------------------------------------------

    def _of(self, place: Place[Location]) -> Pending:
        return self._pending.setdefault((place.step, place.token), Pending(place))

    def take(self, message: Mapping[str, Any]) -> None:
        """A persister tells of a part: it is durable, or it failed."""
        place = Place(self._root, int(message["step"]), Token(*message["token"]))
        with self._shelf.changed:
            pending = self._of(place)
            pending.told.add(int(message["rank"]))
            if "failure" in message:
                if pending.done is None:
                    pending.done = {"error": message["failure"]}
            else:
                pending.parts[int(message["rank"])] = from_json(Part, message["part"])
            if pending.done is not None and "error" in pending.done:
                self._withdraw(pending)
            elif pending.whole is not None and len(pending.parts) == pending.world and not pending.committing:
                pending.committing = True  # the same news may come twice
                self._busy += 1
                threading.Thread(target=self._commit, args=(pending,), daemon=True, name="commit").start()
            self._shelf.changed.notify_all()

    def _withdraw(self, pending: Pending) -> None:
        """Nothing of a failed checkpoint stays; a part that comes later goes when it is told of.

        Aside: a store that does not answer must not hold up those who only want to copy.
        """
        ranks, pending.parts = list(pending.parts), {}
        if ranks:
            self._busy += 1
            pending.withdrawals += 1
            threading.Thread(target=self._delete, args=(pending, ranks), daemon=True, name="withdraw").start()

    def _delete(self, pending: Pending, ranks: Sequence[int]) -> None:
        for rank in ranks:
            withdraw_part(pending.place, rank)
        with self._shelf.changed:
            pending.withdrawals -= 1
        self._settled()

    def _settled(self) -> None:
        with self._shelf.changed:
            self._busy -= 1
            self._shelf.changed.notify_all()

    def _commit(self, pending: Pending) -> None:
        assert pending.whole is not None
        done: dict[str, Any]
        try:
            if pending.debt is not None:
                pay(self._root, pending.debt)
            parts = [pending.parts[r] for r in range(pending.world)]
            arrived = arrived_before(pending.place) if pending.again else None
            manifest = arrived or commit_parts(pending.place, parts, pending.whole)
            done = {"step": pending.place.step, "path": str(pending.place.manifest), "committed": manifest.time}
            done |= {"bytes": manifest.bytes, "written_bytes": manifest.written_bytes}
            done |= {"warning": tidied(self._root, pending.keep, token=pending.place.token)}
        except Exception as error:  # also what is no JSON in extra
            done = {"error": (told := describe(error))}
            # Its rank 0 may be gone, and then nobody asks.
            which = f"step {pending.place.step} of {pending.place.token}"
            print(f"warning: {which} is not committed: {told['what']} {told['why']}", flush=True)
            if isinstance(error, StorageError) and is_full(error):
                with self._shelf.changed:
                    self._withdraw(pending)  # else a manifest that seems not to have arrived may yet
        pending.done = done
        self._settled()

    def outcome(self, token: Token, step: int, *, wait_s: float | None) -> dict[str, Any] | None:
        """What became of a checkpoint, once; None while it is being made, or taken back.

        Args:
            token: Whose it is.
            step: Its step.
            wait_s: How long to wait for that; None: until it is known.
        """
        with self._shelf.changed:
            key = (step, token)
            pending = self._pending.get(key)
            if pending is None:
                return {"error": {"kind": "storage", "what": f"Step {step} was not written.", "why": "", "hint": ""}}
            if not self._shelf.changed.wait_for(lambda: pending.over, wait_s):
                return None
            del self._pending[key]
            return pending.done

    def drain(self, patience_s: float) -> None:
        """Wait for what is being written."""
        with self._shelf.changed:
            self._shelf.changed.wait_for(lambda: self._busy == 0, patience_s)


def describe(error: Exception) -> dict[str, str]:
    """An error, for the rank that has to raise it."""
    if not isinstance(error, PhalanxError):
        return {"kind": "other", "what": f"{type(error).__name__}: {error}", "why": "", "hint": ""}
    known = {CheckpointConflict: "conflict", StorageError: "storage"}  # in the order of descent
    kind = next((name for cls, name in known.items() if isinstance(error, cls)), "other")
    return {"kind": kind, "what": error.what, "why": error.why, "hint": error.hint}


def _whole(held: Held) -> Whole:
    about = held.stream.info.about
    return Whole(
        run_id=str(about["run_id"]),
        plan=from_json(ParallelPlan, about["plan"]),
        model=from_json(ModelSpec, about["model"]),
        trainer=from_json(TrainerState, held.record["trainer"]),
        extra=held.record["extra"],
    )
