"""An order to spawn the ranks of an attempt: made before the port of their rendezvous is known, checked by agents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.host.wire import Message

EnvOf = Callable[[int, int, int, int, str, int], Mapping[str, str]]
"""``(rank, node_rank, local_rank, local_world_size, master_addr, master_port)`` to the rank's variables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpawnOrder:
    """An order that waits for the rendezvous port.

    Attributes:
        attempt: Number of the attempt.
        placement: Node to its ranks; the order of the nodes is that of their ranks.
        first: Node of rank 0, which reserves the port.
        env_of: Makes a rank's variables once the port is known.
        kind: Our own worker (``pretrain``), or the command ``argv`` (``script``).
        argv: Command of a script.
        cwd: Folder in which ranks start; the agent's log folder when empty.
    """

    attempt: int
    placement: Mapping[str, Sequence[int]]
    first: str
    env_of: EnvOf
    kind: str
    argv: Sequence[str] | None
    cwd: str

    def message(self, epoch: int, node_rank: int, ranks: Sequence[int], host: str, port: int) -> Message:
        """What the agent of one node is told.

        Args:
            epoch: Incarnation of the controller.
            node_rank: Place of the node in the gang.
            ranks: Its ranks.
            host: Address of the rendezvous.
            port: Its port.
        """
        environments = [
            dict(self.env_of(rank, node_rank, local_rank, len(ranks), host, port))
            for local_rank, rank in enumerate(ranks)
        ]
        # What all ranks share travels once, so that a large environment does not grow with the node.
        first, *others = environments
        common = dict(
            first.items() if not others else set(first.items()).intersection(*(one.items() for one in others))
        )
        entries = [
            {"rank": rank, "env": {name: environment[name] for name in environment.keys() - common.keys()}}
            for rank, environment in zip(ranks, environments, strict=True)
        ]
        return {
            "op": "spawn",
            "attempt": self.attempt,
            "epoch": epoch,
            "kind": self.kind,
            "argv": list(self.argv) if self.argv is not None else None,
            "cwd": self.cwd,
            "env": common,
            "ranks": entries,
        }


def check_order(order: Message) -> None:
    """Check an order to spawn before anything is changed by it.

    Raises:
        KeyError, TypeError, ValueError: It is malformed.
    """
    kind, argv, cwd = order["kind"], order.get("argv") or [], order.get("cwd", "")
    if kind not in ("pretrain", "script") or (kind == "script" and not argv):
        raise ValueError(f"cannot spawn a job of kind {kind!r} with {argv!r}")
    numbers = [order["attempt"], order["epoch"], *(entry["rank"] for entry in order["ranks"])]
    texts = [cwd, *argv]
    for environment in (order.get("env", {}), *(entry.get("env", {}) for entry in order["ranks"])):
        texts += [*environment.keys(), *environment.values()]
    if not all(type(number) is int for number in numbers) or not all(isinstance(text, str) for text in texts):
        raise TypeError("a number or a text is of another kind")
    if any("\0" in text for text in texts):
        raise ValueError("a text contains a zero byte")
