"""Host agents in real time, thousands in one process: ``python -m tests.support.scale.serve SECRET_FILE NODES STEP_S``.

Prints one line with the addresses of all agents, then obeys lines on its standard input: ``dead NODE`` ends a node as
its power supply would, right after all ranks have reported their next step, ``end`` ends all. Every agent beats as
often as the real one, each in its own phase. Once it has ranks, each of them reports a step every ``STEP_S`` seconds,
all at once, as in synchronous training, with all that a real one tells.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import sys
import time
from collections import deque
from pathlib import Path

from jobs.checkpoint.layout import Token
from jobs.checkpoint.memory import generation_of
from launcher.host.wire import BEATS, Message, read_secret
from strategies.codec import to_json
from tests.support.scale.node import SimNode
from tests.support.scale.play import DETECT_S, SOCKETS_PER_NODE, allow_sockets
from tests.support.scale.storage import Shelf, guests

BEAT_S = DETECT_S / BEATS
SLOTS = 8
MICRO_BATCHES = 36


def told(step: int, step_s: float, draw: random.Random) -> Message:
    """What a rank says of a step (:mod:`jobs.report`): they take turns in being a little slower than others."""
    own_s = step_s * draw.gauss(0.8, 0.02)
    times = {"own_s": round(own_s, 6), "seconds": round(step_s, 6), "copies_every": 1}
    times |= {"queued_s": round(own_s * draw.random() / 1000, 6), "data_s": round(own_s * draw.random() / 1000, 6)}
    return {"step": step, "next": "step", **times, "micro_batches": MICRO_BATCHES}


class Hall:
    """All agents.

    Args:
        secret: The run's secret.
        nodes: How many.
        step_s: Seconds between two steps.
    """

    def __init__(self, secret: bytes, nodes: int, step_s: float) -> None:
        self._selector = selectors.DefaultSelector()
        self._step_s = step_s
        self._step_at, self._step = float("inf"), 0
        self._draw = random.Random(0)
        self._doomed: list[str] = []
        self.nodes: dict[str, SimNode] = {}
        for index in range(nodes):
            node = SimNode(
                name=f"n{index:04d}",
                slots=SLOTS,
                secret=secret,
                selector=self._selector,
                wall=time.time,
                heard=self._heard,
            )
            self.nodes[node.name] = node
        start = time.monotonic()
        phases = enumerate(self.nodes.values())
        self._beats = deque((start + BEAT_S * index / nodes, node) for index, node in phases)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, self._command)
        self._open = True

    def _heard(self, node: SimNode, message: Message) -> None:
        if message["op"] == "spawn":
            node.shelf = self._saved(node, message)
        if message["op"] == "spawn" and 0 in node.ranks:
            restored = generation_of((message["env"] | message["ranks"][0]["env"])["PHALANX_RESUME_FROM"])
            self._step, self._step_at = restored.step if restored else 0, time.monotonic() + self._step_s
            node.report("training", step=self._step + 1, micro_batches=MICRO_BATCHES)
        elif message["op"] == "kill":
            self._step_at = float("inf")

    def _saved(self, node: SimNode, order: Message) -> Shelf:
        """What the node holds in memory when this attempt falls: as if every one of them made ten steps."""
        env = order["env"] | order["ranks"][0]["env"]
        place, world = int(env["GROUP_RANK"]), int(env["WORLD_SIZE"])
        kept = guests(-(-world // SLOTS), apart=True)[place] * SLOTS
        step, token = 10 * node.attempt, Token(node.epoch, node.attempt)
        replicas = range(kept, min(world, kept + SLOTS))
        return Shelf(token=token, steps=(step - 1, step), own=node.ranks, replicas=replicas, world=world)

    def _command(self) -> None:
        for line in os.read(sys.stdin.fileno(), 4096).decode().splitlines() or ["end"]:
            word, _, name = line.partition(" ")
            if word == "dead":
                self._doomed.append(name)
            elif word == "end":
                self._open = False

    def _report(self) -> None:
        self._step += 1
        self._step_at += self._step_s
        for node in self.nodes.values():
            for rank in node.ranks:
                node.say("step", **told(self._step, self._step_s, self._draw), rank=rank, attempt=node.attempt)
            self._beat()
        while self._doomed:
            name = self._doomed.pop()
            print(json.dumps({"dead": name, "time": time.time()}), flush=True)
            self.nodes.pop(name).die()

    def _beat(self) -> None:
        """Those that are due."""
        now = time.monotonic()
        while self._beats[0][0] <= now:
            due, node = self._beats.popleft()
            if not node.gone:
                node.beat()
                self._beats.append((due + BEAT_S, node))

    def serve(self) -> None:
        """Until told to end."""
        while self._open:
            self._beat()
            if time.monotonic() >= self._step_at:
                self._report()
            for key, _ in self._selector.select(max(0.0, self._beats[0][0] - time.monotonic())):
                key.data()


def main() -> None:
    """Entry point."""
    secret, nodes, step_s = read_secret(Path(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    allow_sockets(SOCKETS_PER_NODE * nodes)
    hall = Hall(secret, nodes, step_s)
    print(json.dumps([to_json(node.address) for node in hall.nodes.values()]), flush=True)
    hall.serve()


if __name__ == "__main__":
    main()
