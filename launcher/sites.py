"""Where the nodes of a rehearsal are: plain processes are put into namespaces, which are entered by a command.

``sites.json`` in the run directory, written before the run starts. A node with a site is treated like another machine:
what cannot be reached over its link cannot be killed either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.paths import RunPaths
from launcher.store import dump, read_json, write_atomic
from strategies.codec import from_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where one node is.

    Attributes:
        address: Address that its agent listens on.
        enter: Command that runs the command after it there.
    """

    address: str
    enter: tuple[str, ...]


def write(paths: RunPaths, sites: Mapping[str, Site]) -> None:
    """Say where nodes are.

    Raises:
        StorageError: The run directory cannot be written.
    """
    write_atomic(paths.sites, dump(dict(sites)))


def read(paths: RunPaths) -> dict[str, Site]:
    """Node to its site; a node that is not named is on this machine.

    Raises:
        StorageError: The file is damaged.
    """
    if not paths.sites.exists():
        return {}
    return {node: from_json(Site, site) for node, site in read_json(paths.sites).items()}
