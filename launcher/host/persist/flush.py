"""The disk tier behind the ranks: writes the parts of this node, and commits when every rank's part is durable.

The persister of rank 0's node coordinates: the others tell it what they have written, or why they could not. On the
first failure everybody withdraws what was written, and rank 0 learns the reason when it asks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.checkpoint.errors import CheckpointConflict
from jobs.checkpoint.layout import Place, Token
from jobs.checkpoint.manifest import TrainerState
from jobs.checkpoint.parts import Part, Whole, commit_parts, withdraw_part, write_part
from jobs.checkpoint.retention import prune
from launcher.host.persist.shelf import Held, Shelf
from strategies.codec import from_json, to_json
from strategies.errors import PhalanxError
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
        durable: Set once it is written, or has failed.
        released: Set once the commit may go on without asking its rank.
    """

    held: Held
    place: Place
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
        done: What became of it: ``step``, ``path``, ``bytes``; or ``error``.
    """

    place: Place
    parts: dict[int, Part] = field(default_factory=dict)
    whole: Whole | None = None
    world: int = 0
    keep: int = 0
    done: dict[str, Any] | None = None


class Flusher:
    """Writes parts in the background.

    Args:
        shelf: Where the parts are.
        root: Folder of all checkpoints of the run.
        tell: How to reach the coordinator of an attempt.
    """

    def __init__(self, shelf: Shelf, root: Path, tell: Tell) -> None:
        self._shelf = shelf
        self._root = root
        self._tell = tell
        self._pending: dict[tuple[int, Token], Pending] = {}
        self._busy = 0

    def start(self, held: Held, *, hold: bool, keep: int) -> Writing:
        """Write a sealed part; with ``hold`` it does not count before :attr:`Writing.released` is set."""
        writing = Writing(held, Place(self._root, held.step, held.stream.info.token))
        if not hold:
            writing.released.set()
        self._shelf.pin(held)
        with self._shelf.changed:
            self._busy += 1
            if held.stream.info.rank == 0:
                pending = self._of(writing.place)
                pending.whole, pending.world, pending.keep = _whole(held), held.stream.info.world, keep
        threading.Thread(target=self._write, args=(writing,), daemon=True, name="flush").start()
        return writing

    def _write(self, writing: Writing) -> None:
        held, info = writing.held, writing.held.stream.info
        report: dict[str, Any]
        try:
            part = write_part(
                writing.place,
                info.rank,
                held.stream.image.pieces(held.buffer.view),
                held.record["rank_state"],
                int(held.record["trainer"]["optimizer_steps"]),
            )
            report = {"part": to_json(part)}
        except PhalanxError as error:
            report = {"failure": describe(error)}
        finally:
            self._shelf.unpin(held)
            writing.durable.set()
        writing.released.wait()
        message = {"op": "part", "token": info.token, "step": held.step, "rank": info.rank} | report
        try:
            self._tell(info.token, message)
        finally:
            with self._shelf.changed:
                self._busy -= 1
                self._shelf.changed.notify_all()

    # -- the coordinator -------------------------------------------------------------------------------------------

    def _of(self, place: Place) -> Pending:
        return self._pending.setdefault((place.step, place.token), Pending(place))

    def take(self, message: Mapping[str, Any]) -> None:
        """A persister tells of a part: it is durable, or it failed."""
        place = Place(self._root, int(message["step"]), Token(*message["token"]))
        with self._shelf.changed:
            pending = self._of(place)
            if "failure" in message:
                if pending.done is None:
                    pending.done = {"error": message["failure"]}
            else:
                pending.parts[int(message["rank"])] = from_json(Part, message["part"])
            failed = pending.done is not None
            complete = pending.whole is not None and len(pending.parts) == pending.world and not failed
        if failed:
            self._withdraw(pending)
        elif complete:
            self._commit(pending)
        with self._shelf.changed:
            self._shelf.changed.notify_all()

    def _withdraw(self, pending: Pending) -> None:
        """Nothing of a failed checkpoint stays; a part that comes later goes when it is told of."""
        for rank in list(pending.parts):
            withdraw_part(pending.place, rank)
            del pending.parts[rank]

    def _commit(self, pending: Pending) -> None:
        assert pending.whole is not None
        try:
            manifest = commit_parts(pending.place, [pending.parts[r] for r in range(pending.world)], pending.whole)
            done: dict[str, Any] = {"step": pending.place.step, "path": str(pending.place.manifest)}
            done |= {"bytes": manifest.bytes}
            pending.done = done
            prune(self._root, pending.keep, token=pending.place.token)
        except (PhalanxError, TypeError, ValueError) as error:  # also what is no JSON in extra
            pending.done = {"error": describe(error)}

    def outcome(self, token: Token, step: int, *, wait: bool) -> dict[str, Any] | None:
        """What became of a checkpoint, once; None while it is being made."""
        with self._shelf.changed:
            key = (step, token)
            pending = self._pending.get(key)
            if pending is None:
                return {"error": {"kind": "storage", "what": f"Step {step} was not written.", "why": "", "hint": ""}}
            if wait:
                self._shelf.changed.wait_for(lambda: pending.done is not None)
            if pending.done is not None and "error" not in pending.done:
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
    kind = "conflict" if isinstance(error, CheckpointConflict) else "storage"
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
