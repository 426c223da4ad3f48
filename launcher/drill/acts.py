"""What a drill does from outside, while the controller of the run knows nothing of it.

An act waits for its moment, then does one thing and says what it did. Where the place must be exact, a rank has stopped
itself there before (``held``); the act that follows lets it go on or kills it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from jobs import checkpoint
from jobs.paths import RunPaths
from jobs.proctree import kill_trees
from launcher.backend import AgentAddress
from launcher.drill.network import Network
from launcher.host import announce, process
from launcher.run import EventKind, Run, RunEvent
from strategies.errors import ClusterError

SLOW_RATE = "8mbit"


class Stage(Protocol):
    """The run under rehearsal, as acts see it."""

    paths: RunPaths
    network: Network | None
    held_pid: int

    def run(self) -> Run:
        """The run as its log tells it now."""

    def events(self) -> list[RunEvent]:
        """Its log."""

    def gang_node(self, which: str) -> str:
        """Name of a node of the gang as it was when the fault struck: ``target``, ``other`` or ``spare``."""

    def saved(self) -> bool:
        """Whether the last checkpoint before the fault is committed: it is written behind the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Act:
    """One thing to do.

    Attributes:
        do: Does it and says what was done.
        held: Its moment is when the rank has stopped itself.
        after: Its moment is when the log has an event of this kind ...
        attempt: ... of this attempt or a later one.
        before: Its moment is over when the log has one of this kind after that.
        saved: Not before the last checkpoint is committed.
        relief: It ends a disturbance: it is no fault itself.
        strikes: What the log must name because of it: the ``rank`` of the aim, or its ``target`` or ``other`` node.
    """

    do: Callable[[Stage], str]
    held: bool = False
    after: EventKind | None = None
    attempt: int = 0
    before: EventKind | None = None
    saved: bool = False
    relief: bool = False
    strikes: Literal["", "rank", "target", "other"] = ""

    def proof(self, number: int) -> str:
        """Name of its record, as the act of this number (from 1)."""
        return f"drill.{number}" + (".relief" if self.relief else "")

    def due(self, stage: Stage) -> bool:
        """Whether its moment has come, and is not over."""
        if (self.held and not stage.held_pid) or (self.saved and not stage.saved()):
            return False
        return self.over(stage.events()) == math.inf

    def over(self, events: Sequence[RunEvent]) -> float | None:
        """When its moment is over by the log (UTC seconds): infinity while it lasts, None while it has not come."""
        since = 0
        if self.after is not None:
            fitting = (event.kind is self.after and event.attempt >= self.attempt for event in events)
            since = next((number for number, fits in enumerate(fitting) if fits), -1)
        if since < 0:
            return None
        return next((event.time for event in events[since:] if event.kind is self.before), math.inf)


# ---- processes --------------------------------------------------------------------------------------------------


def let_go(stage: Stage) -> str:
    """The rank that had stopped itself goes on."""
    process.send(stage.held_pid, signal.SIGCONT)
    return f"SIGCONT of rank process {stage.held_pid}"


def kill_held(stage: Stage) -> str:
    """The rank that had stopped itself dies."""
    process.send(stage.held_pid, signal.SIGKILL)
    return f"SIGKILL of rank process {stage.held_pid}"


def kill_node(which: str) -> Callable[[Stage], str]:
    """SIGKILL of a node's agent and of everything below it."""

    def act(stage: Stage) -> str:
        agent = _agent(stage, which)
        killed = kill_trees([agent.pid])
        process.kill_marked(f"{agent.incarnation}.")
        return f"SIGKILL of all {len(killed)} processes of {agent.node}"

    return act


def give_notice(stage: Stage) -> str:
    """SIGTERM at the agent, as a cloud announces that it takes the machine away."""
    agent = _agent(stage, "target")
    process.send(agent.pid, signal.SIGTERM)
    return f"SIGTERM at the agent of {agent.node} (process {agent.pid})"


def kill_ray_head(stage: Stage) -> str:
    """SIGKILL of everything on the head of the embedded Ray cluster."""
    from launcher.embedded import kill_members, members, node_mark

    mark = node_mark(stage.paths.root, "head")
    there = members(mark)
    if not there:
        raise ClusterError("The head of the rehearsal's Ray cluster is not there.")
    left = kill_members(mark)
    return f"SIGKILL of {len(there)} processes of the Ray head ({len(left)} would not go)"


def _agent(stage: Stage, which: str) -> AgentAddress:
    node = stage.gang_node(which)
    found = announce.read(announce.path_of(stage.paths, node))
    if found is None:
        raise ClusterError(f"{node} has no agent that could be struck.")
    return found


# ---- links ------------------------------------------------------------------------------------------------------


def cut(stage: Stage) -> str:
    """Pull the cable of a node."""
    net, index = _link(stage)
    net.cut(index)
    return f"link of {stage.gang_node('target')} ({net.addresses[index]}) down"


def mend(stage: Stage) -> str:
    """Plug it in again, while those who were cut off are still there."""
    net, index = _link(stage)
    behind, node = len(net.pids(index)), stage.gang_node("target")
    if not behind:
        raise ClusterError(f"Nobody is left behind the link of {node}.")
    net.mend(index)
    return f"link of {node} ({net.addresses[index]}) up again, {behind} processes behind it"


def slow_down(stage: Stage) -> str:
    """Limit what a node can send and receive."""
    net, index = _link(stage)
    net.slow_down(index, SLOW_RATE)
    return f"link of {stage.gang_node('target')} limited to {SLOW_RATE} both ways"


def count_packets(stage: Stage) -> str:
    """Prove that the slow link was used."""
    net, index = _link(stage)
    packets = net.packets(index)
    if not packets:
        raise ClusterError("No packet has gone through the slow link.")
    return f"{packets} packets went through the slow link"


def _link(stage: Stage) -> tuple[Network, int]:
    assert stage.network is not None
    return stage.network, int(stage.gang_node("target").removeprefix("node"))


# ---- checkpoints ------------------------------------------------------------------------------------------------


def flip_bit(stage: Stage) -> str:
    """Flip one bit in the middle of a shard of the newest checkpoint."""
    shard = _shard(stage)
    with open(shard, "r+b") as file:
        file.seek(shard.stat().st_size - 100)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return f"one bit flipped in {_told(shard, stage)}"


def truncate(stage: Stage) -> str:
    """Cut a shard of the newest checkpoint to half its size."""
    shard = _shard(stage)
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    return f"{_told(shard, stage)} cut from {size} to {size // 2} bytes"


def remove_shard(stage: Stage) -> str:
    """Delete a shard of the newest checkpoint."""
    shard = _shard(stage)
    shard.unlink()
    return f"{_told(shard, stage)} deleted"


def spoil_manifest(stage: Stage) -> str:
    """Overwrite a piece of the newest checkpoint's manifest."""
    manifest = _newest(stage)
    data = bytearray(manifest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = b"\0" * 16
    manifest.write_bytes(data)
    return f"16 bytes of {_told(manifest, stage)} overwritten"


def _newest(stage: Stage) -> Path:
    found = checkpoint.list_checkpoints(stage.paths.checkpoint_dir)
    if not found:
        raise ClusterError("There is no checkpoint yet that could be damaged.")
    return Path(str(found[0].path))


def _shard(stage: Stage) -> Path:
    """The largest shard of the newest checkpoint."""
    manifest = _newest(stage)
    folder = manifest.parent / manifest.name.removesuffix(".manifest.json")
    return max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def _told(path: Path, stage: Stage) -> str:
    return str(path.relative_to(stage.paths.checkpoint_dir))


# ---- file systems -----------------------------------------------------------------------------------------------


def fill_disk(stage: Stage) -> str:
    """Leave not one byte on the file system of the checkpoints."""
    written = 0
    with open(_filler(stage), "ab", buffering=0) as file:
        for chunk in (1 << 16, 1 << 12, 1):
            written += sum(_until_full(file, bytes(chunk)))
    return f"{written} bytes written to the disk of the checkpoints, until it said that it is full"


def _until_full(file: Any, data: bytes) -> Iterator[int]:
    while True:
        try:
            done = file.write(data)
        except OSError:
            return
        yield done
        if done < len(data):
            return


def free_disk(stage: Stage) -> str:
    """Give the room back."""
    _filler(stage).unlink()
    return "the disk of the checkpoints has room again"


def _filler(stage: Stage) -> Path:
    return stage.paths.checkpoint_dir / "filler"


def freeze_disk(stage: Stage) -> str:
    """Whoever writes to the file system of the checkpoints hangs in the kernel from now on."""
    _command("fsfreeze", "--freeze", str(stage.paths.checkpoint_dir))
    return "the file system of the checkpoints is frozen"


def thaw_disk(stage: Stage) -> str:
    """It goes on."""
    _command("fsfreeze", "--unfreeze", str(stage.paths.checkpoint_dir))
    return "the file system of the checkpoints goes on"


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(words)} failed.", why=done.stderr.strip())
