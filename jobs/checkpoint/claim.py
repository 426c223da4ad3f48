"""Whose checkpoints lie at an address: a record that just one run can create, and the proof that the store is able to.

A run's own folder needs none. Elsewhere two runs of one name could meet, and one would go on from the other's weights.
"""

from __future__ import annotations

import json
from typing import Any

from jobs.checkpoint.errors import storage_error
from jobs.checkpoint.storage import storage_of
from jobs.location import Location
from strategies.errors import ConfigError, ResumeRefused, StorageError

RECORD = "run.json"


def claim(root: Location, *, run: str, owner: str) -> None:
    """Make ``root`` the place of a run's checkpoints.

    Args:
        root: Where they will be kept.
        run: Name of the run, for people.
        owner: What identifies the run among all that ever were.

    Raises:
        ConfigError: Another run keeps its checkpoints there.
        StorageError: Nothing can be written there, or a second writer is not refused there.
    """
    storage, record = storage_of(root), root / RECORD
    try:
        storage.create(record, [_document(run, owner)])
        storage.settle(root)
    except FileExistsError:
        raise ConfigError(
            f"{root} holds the checkpoints of another run.",
            why=f"its {RECORD} names another owner",
            hint="Choose another run.name or checkpoint.url, or delete what is there.",
        ) from None
    except OSError as error:
        raise storage_error("keep checkpoints", root, error) from error
    try:
        storage.create(record, [_document(run, f"not {owner}")])
    except FileExistsError:
        return
    except OSError as error:
        raise storage_error("keep checkpoints", root, error) from error
    raise StorageError(
        f"Checkpoints cannot be kept at {root}.",
        why="a second writer may overwrite a file there: a replaced gang could overwrite what its successor saves",
        hint="Use a store that honours If-None-Match on PUT.",
    )


def require_ours(root: Location, *, run: str, owner: str) -> None:
    """Refuse to go on with checkpoints that are not the run's.

    Raises:
        ResumeRefused: They are another run's.
        StorageError: They are gone, or cannot be read.
    """
    record = root / RECORD
    try:
        found: Any = json.loads(storage_of(root).read(record))
        theirs = str(found["owner"])
    except FileNotFoundError:
        raise StorageError(
            f"The checkpoints of '{run}' are gone.",
            why=f"{record} does not exist",
            hint="Bring them back, or phalanx submit a new run.",
        ) from None
    except OSError as error:
        raise storage_error("read the checkpoints", root, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{record} cannot be understood.", why=str(error)) from error
    if theirs != owner:
        raise ResumeRefused(
            f"{root} holds the checkpoints of another run than this '{run}'.",
            hint="Bring the run's own checkpoints back, or phalanx submit a new run.",
        )


def _document(run: str, owner: str) -> bytes:
    return json.dumps({"run": run, "owner": owner}).encode() + b"\n"
