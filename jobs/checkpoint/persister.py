"""A rank's connection to the persister of its node. Standard library only.

What can be asked is listed in :mod:`launcher.host.persist.service`.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from jobs import frames
from jobs.frames import FrameError, Garbled, Message
from strategies.errors import StorageError

PERSISTER = "PHALANX_PERSISTER"
"""Environment variable with the path of the persister's socket; where it is missing, ranks write for themselves."""


class Refused(FrameError):
    """The persister answered that it cannot do it."""


class PersisterLink:
    """The connection; raises FrameError for all that goes wrong.

    Args:
        path: The persister's socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._turn = threading.Lock()  # a rank asks from two threads
        self._sock = frames.connect_unix(path)

    def ask(self, op: str, **fields: Any) -> tuple[Message, bytes, list[int]]:
        """Ask and wait for the answer, its payload and its descriptors."""
        with self._turn:
            frames.send(self._sock, {"op": op, **fields})
            answer, fds = frames.receive(self._sock)
            data = frames.read(self._sock, answer["payload"])
        if "error" in answer:
            raise (Garbled if answer.get("garbled") else Refused)(str(answer["error"]))
        return answer, data, fds

    def close(self) -> None:
        """End it; what was sealed goes its way."""
        self._sock.close()


def link_from_environment() -> PersisterLink | None:
    """The persister of this node, if the agent has started one.

    Raises:
        StorageError: It does not answer.
    """
    path = os.environ.get(PERSISTER, "")
    if not path:
        return None
    try:
        return PersisterLink(path)
    except FrameError as error:
        raise unreachable(error) from error


def unreachable(error: FrameError) -> StorageError:
    """What a rank raises that has lost its persister."""
    return StorageError(
        "The persister of this node does not do its work.",
        why=str(error),
        hint="The gang starts again with a new one; look into persister.log in the agent's folder if it happens often.",
    )
