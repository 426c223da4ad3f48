"""How an agent says where it is: one small file per node in the run directory, written aside and renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jobs.paths import RunPaths
from launcher.backend import AgentAddress
from strategies.codec import from_json, to_json
from strategies.errors import ConfigError


def path_of(paths: RunPaths, node: str) -> Path:
    """The announcement of ``node``."""
    return paths.agents / f"{node}.json"


def write(paths: RunPaths, address: AgentAddress) -> None:
    """Announce an agent, in place of an earlier one of the same node."""
    paths.agents.mkdir(parents=True, exist_ok=True)
    target = path_of(paths, address.node)
    aside = target.with_name(f".{target.name}.{address.incarnation}")
    with open(aside, "w") as file:
        json.dump(to_json(address), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, target)


def read(path: Path) -> AgentAddress | None:
    """One announcement; None when it is gone or damaged."""
    try:
        return from_json(AgentAddress, json.loads(path.read_text()))
    except (OSError, ValueError, ConfigError):
        return None


def read_all(paths: RunPaths) -> list[AgentAddress]:
    """All announcements, in the order of the nodes' names."""
    found = (read(path) for path in sorted(paths.agents.glob("*.json")))
    return [address for address in found if address is not None]


def remove(paths: RunPaths, address: AgentAddress) -> None:
    """Take an announcement back, unless a later agent of the node has replaced it."""
    current = read(path_of(paths, address.node))
    if current is not None and current.incarnation == address.incarnation:
        path_of(paths, address.node).unlink(missing_ok=True)
