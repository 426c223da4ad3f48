"""A resume before anybody has the right to make it: the new request lies aside until a controller has won the lock.

::

    control/proposals/<digest>-<word>/  request.json, config.yaml, overrides.yaml and, of a script whose project has
                                        changed, the folder user-N, as the run directory will have them

The client proposes; whoever wins the lock promotes, be it this process or a detached controller. A resume that is
refused has changed nothing. Two equal ones are two proposals, so that the one that is refused takes nothing from the
other. What a client that was killed has left is swept away by a later one that wins.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.ending import take_ballast
from launcher.request import LaunchRequest
from launcher.ship import Shipment, ship_project
from launcher.store import RunStore, dump, read_json, write_atomic
from launcher.supervise import withdraw_cancel
from strategies.codec import from_json
from strategies.errors import StorageError

_DIGITS = 12
_FORGOTTEN_S = 86400.0  # of a client that was killed: no one waits this long between proposing and promoting
_REQUEST, _CONFIG, _OVERRIDES = "request.json", "config.yaml", "overrides.yaml"


def propose(
    store: RunStore, request: LaunchRequest, *, config: bytes, overrides: bytes, shipment: Shipment | None = None
) -> str:
    """Lay a new request aside.

    Args:
        store: The run.
        request: The new request.
        config: The resolved configuration, as a file.
        overrides: What the user typed, as a file.
        shipment: A script's project to copy to the request's ``workdir``.

    Returns:
        Name of the proposal, for :func:`promote`.

    Raises:
        StorageError: It cannot be written; nothing is left of it.
    """
    name = f"{request.digest[:_DIGITS]}-{secrets.token_hex(4)}"
    folder = _folder(store, name)
    try:
        if shipment is not None:
            ship_project(shipment, folder / Path(request.job.workdir).name)
        write_atomic(folder / _CONFIG, config)
        write_atomic(folder / _OVERRIDES, overrides)
        write_atomic(folder / _REQUEST, dump(request))
    except BaseException:
        discard(store, name)
        raise
    return name


def load(store: RunStore, name: str) -> LaunchRequest:
    """A proposed request.

    Raises:
        StorageError: It is not there, or damaged.
    """
    path = _folder(store, name) / _REQUEST
    return from_json(LaunchRequest, read_json(path), where=str(path))


def promote(store: RunStore, name: str) -> None:
    """Make a proposal the run's request. Only for who has won the lock; doing it again does nothing.

    The request is replaced last: until then the run is what it was.

    Raises:
        StorageError: The proposal is gone, or the run directory cannot be written.
    """
    folder = _folder(store, name)
    if not folder.is_dir() and store.request().digest[:_DIGITS] == name[:_DIGITS]:
        return  # an earlier incarnation of this controller has done it
    request = load(store, name)
    try:
        now = folder.stat().st_mtime
        for project in folder.glob("user*"):
            os.replace(project, store.paths.root / project.name)
        for file, target in ((_CONFIG, store.paths.config), (_OVERRIDES, store.paths.overrides)):
            write_atomic(target, (folder / file).read_bytes())
    except OSError as error:
        why, hint = error.strerror or str(error), "Mend the run directory, then resume again."
        raise StorageError(f"The new request of '{store.name}' cannot be put in place.", why=why, hint=hint) from error
    store.write_request(request)
    discard(store, name)
    _sweep(store, now)


def accept(store: RunStore, wish: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Carry out what a person's resume changes in the run directory. Only for who has won the lock.

    Args:
        store: The run.
        wish: The wish to continue; under ``request`` the name of a proposal, if the request changes.

    Returns:
        The wish as the log is to record it.

    Raises:
        StorageError: The run directory cannot be written.
    """
    if wish is None:
        return None
    if wish.get("request"):
        promote(store, str(wish["request"]))
    withdraw_cancel(store)
    take_ballast(store)
    return {key: value for key, value in wish.items() if key != "request"}


def discard(store: RunStore, name: str) -> None:
    """Forget a proposal."""
    shutil.rmtree(_folder(store, name), ignore_errors=True)


def _sweep(store: RunStore, now: float) -> None:
    """Forget proposals that are much older than the file time ``now``, of the same file system's clock."""
    for folder in (store.paths.control / "proposals").glob("*"):
        try:
            forgotten = folder.stat().st_mtime < now - _FORGOTTEN_S
        except OSError:
            continue  # its own client has just discarded it
        if forgotten:
            discard(store, folder.name)


def _folder(store: RunStore, name: str) -> Path:
    return store.paths.control / "proposals" / name
