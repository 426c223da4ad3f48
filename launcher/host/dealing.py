"""Devices for nodes that share a machine: each place in a gang has its own. Pure, but for what it is told.

Where ``cluster=process`` or ``cluster=local`` starts several nodes here, all of them see all devices, and the first
rank of each would take the first one. Devices belong to places in the gang, not to nodes: a spare needs none until it
takes the place of a node that is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher.host.accelerator import ACCELERATOR, CPU, Devices

DEALT = "PHALANX_DEVICES"
"""Variable of agents: ``CUDA_VISIBLE_DEVICES=0,1;2,3``, several of them with blanks between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deal:
    """Who gets what.

    Attributes:
        accelerator: DeepSpeed's name of what is computed on.
        shares: Devices of each place in the gang; none on the CPU.
        why: Why it is the CPU although there are devices, or "".
        variables: Those that give a rank its devices.
    """

    accelerator: str
    shares: tuple[tuple[str, ...], ...] = ()
    why: str = ""
    variables: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """For the agents; they judge for themselves where there is nothing to choose."""
        if not self.shares:
            return {ACCELERATOR: CPU} if self.why else {}
        words = ";".join(",".join(share) for share in self.shares)
        return {ACCELERATOR: self.accelerator, DEALT: " ".join(f"{name}={words}" for name in self.variables)}

    @property
    def where(self) -> str:
        """What is computed on, in a few words."""
        if not self.shares:
            return self.accelerator.upper()
        return f"{self.accelerator.upper()} {' | '.join(','.join(share) for share in self.shares)}"

    @property
    def note(self) -> str:
        """A sentence for people; "" where there is nothing to choose."""
        if self.why:
            return f"the ranks compute on the CPU: {self.why}"
        return f"devices of this machine, node by node: {self.where}" if self.shares else ""


def deal(found: Devices | None, *, nodes: int, slots: int) -> Deal:
    """Devices for all slots of a gang, or the CPU for all of it.

    Args:
        found: What this machine has.
        nodes: Nodes of the gang, without spares.
        slots: Slots per node.
    """
    if found is None:
        return Deal(accelerator=CPU)
    if len(found.ids) < nodes * slots:
        have = f"{len(found.ids)} device{'s' if len(found.ids) > 1 else ''}"
        return Deal(accelerator=CPU, why=f"this machine has {have} for {nodes * slots} slots")
    shares = tuple(found.ids[node * slots : (node + 1) * slots] for node in range(nodes))
    return Deal(accelerator=found.accelerator, shares=shares, variables=found.variables)


def read(dealt: str) -> Callable[[str], Mapping[str, str]]:
    """What gives the variables of a rank by its place in the gang (``NODE_RANK``).

    Args:
        dealt: Value of :data:`DEALT`.
    """
    pairs = [word.partition("=") for word in dealt.split()]
    shares = {name: words.split(";") for name, _, words in pairs}

    def variables(node_rank: str) -> Mapping[str, str]:
        return {name: mine[int(node_rank)] for name, mine in shares.items()} if node_rank else {}

    return variables
