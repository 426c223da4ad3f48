"""An order to start a controller on a cluster, and who has the last word on it.

The client may lose patience while Ray still looks for a place for the controller. So each order has a name, and one
file in the run directory that says what became of it: either the controller has *taken* it, or the client has
*withdrawn* it. Only one of them can create that file, wherever they are.
"""

from __future__ import annotations

import enum
import json
import secrets
from collections.abc import Mapping
from typing import Any

from jobs.paths import RunPaths
from launcher.store import create_exclusive
from strategies.errors import StorageError

FOLDER = "shared"


class Fate(enum.Enum):
    """What became of an order."""

    OPEN = "open"
    TAKEN = "taken"
    WITHDRAWN = "withdrawn"


def place(paths: RunPaths, address: str, *, resume: Mapping[str, Any] | None, adopt: bool) -> tuple[str, str]:
    """Make an order; returns its name and what the cluster has to be told.

    Raises:
        StorageError: The run directory cannot be written.
    """
    name = secrets.token_hex(8)
    create_exclusive(paths.control / FOLDER / name, name.encode())
    wish = None if resume is None else {"id": name, **resume}
    return name, json.dumps({"address": address, "nonce": name, "resume": wish, "adopt": adopt})


def fate(paths: RunPaths, name: str) -> Fate:
    """What became of an order.

    Raises:
        StorageError: The run directory cannot be read.
    """
    path = paths.control / FOLDER / f"{name}.fate"
    try:
        return Fate(path.read_text())
    except FileNotFoundError:
        return Fate.OPEN
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot read {path}.", why=str(error)) from error


def take(paths: RunPaths, name: str) -> bool:
    """The controller obeys; returns whether it may.

    Raises:
        StorageError: The run directory cannot be written.
    """
    return _decide(paths, name, Fate.TAKEN)


def withdraw(paths: RunPaths, name: str) -> bool:
    """The client gives up; returns whether no controller will come of the order any more.

    Raises:
        StorageError: The run directory cannot be written.
    """
    return _decide(paths, name, Fate.WITHDRAWN)


def _decide(paths: RunPaths, name: str, wanted: Fate) -> bool:
    created = create_exclusive(paths.control / FOLDER / f"{name}.fate", wanted.value.encode())
    return created or fate(paths, name) is wanted
