"""Faults on purpose, at an exact place: ``kind@key=value,key=value``. Each fires once per run and leaves a proof.

=============  ================  ====================================================================================
``rank_kill``  ``rank``          SIGKILL of the rank
``rank_exit``  ``rank``          the rank exits with code 17, without a word
``rank_error`` ``rank``          the rank raises :class:`InjectedFault`
``device_lost`` ``rank``         the rank raises what torch does whose device has fallen off the bus
``rank_stop``  ``rank``          SIGSTOP of the rank
``rank_spin``  ``rank``          the rank holds the interpreter's lock for ever
``rank_deadlock`` ``rank``       the rank enters its next collective with another group than its own
``rank_slow``  ``rank``          from that step on, until its process ends, the rank makes steps take 1.3 times as long
``nan_grad``   ``rank``          a gradient of the rank is NaN in that step
``loss_spike`` ``rank``          what the rank puts out is 100 times too large in that step; last pipeline stage only
``bad_update`` ``rank``          the rank's update of the weights is wildly too large: it shows in the next step's loss
``node_kill``  ``node``          SIGKILL of everything on the node: the raylet above the rank, the host agent, all below
``agent_kill`` ``node``          SIGKILL of the host agent alone
=============  ================  ====================================================================================

Every kind takes ``step`` and ``phase=step_begin|step_end|checkpoint|shards_written|restore`` (``step_begin`` by
default; ``restore`` takes no step: it is the first of the run; what spoils numbers, and ``rank_deadlock``, takes no
phase). ``rank``, ``node`` and ``step`` may be ``random``; :func:`resolve` makes that a pure function of a seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from jobs.checkpoint.layout import write_durably
from jobs.fault_acts import (
    Drag,
    Removable,
    go_astray,
    hold_the_interpreter,
    name_exclusively,
    spoil,
    wait_for_death,
)
from jobs.numerics import LEAST_SEEN
from jobs.paths import RunPaths
from jobs.proctree import ancestors, descendants, kill_own_trees
from jobs.report import Reporter
from jobs.spec import RankEnv
from strategies.errors import ConfigError, StorageError, did_you_mean

Numeric = Literal["nan_grad", "loss_spike", "bad_update"]
Kind = Literal[
    Numeric,
    "rank_kill",
    "rank_exit",
    "rank_error",
    "device_lost",
    "rank_stop",
    "rank_spin",
    "rank_deadlock",
    "rank_slow",
    "node_kill",
    "agent_kill",
]
Phase = Literal["step_begin", "step_end", "checkpoint", "shards_written", "restore"]
RANDOM = "random"
RANK_EXIT_CODE = 17
AGENT_PID = "PHALANX_AGENT_PID"
_TARGET: dict[str, str] = {kind: "node" if kind in ("node_kill", "agent_kill") else "rank" for kind in get_args(Kind)}
NUMERIC: tuple[Numeric, ...] = get_args(Numeric)
_SPIKES = ("loss_spike", "bad_update")
_WITHIN_A_STEP = (*NUMERIC, "rank_deadlock")
_SAVING = ("checkpoint", "shards_written")


class InjectedFault(RuntimeError):
    """What ``rank_error`` and ``device_lost`` raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        kind: What happens.
        target: Rank or node that it happens to; None means random.
        step: Step at which it happens (from 1); None means random. 0 for ``phase="restore"``.
        phase: Where in the step.
    """

    kind: Kind
    target: int | None
    step: int | None
    phase: Phase = "step_begin"

    @property
    def scope(self) -> str:
        """``rank`` or ``node``: what ``target`` counts."""
        return _TARGET[self.kind]

    def __str__(self) -> str:
        keys = [f"{self.scope}={RANDOM if self.target is None else self.target}"]
        if self.phase != "restore":
            keys.append(f"step={RANDOM if self.step is None else self.step}")
        if self.phase != "step_begin":
            keys.append(f"phase={self.phase}")
        return f"{self.kind}@{','.join(keys)}"


def parse(texts: Sequence[str]) -> tuple[Fault, ...]:
    """Read faults.

    Raises:
        ConfigError: Lists every mistake in all of them.
    """
    problems: list[str] = []
    faults = [_parse(text, problems) for text in texts]
    _refuse(problems)
    return tuple(fault for fault in faults if fault is not None)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(
            "The faults cannot be injected:" + "".join(f"\n  - {problem}" for problem in problems),
            hint='Write them like faults=["rank_kill@rank=3,step=12","node_kill@node=random,step=random"].',
        )


def _parse(text: str, problems: list[str]) -> Fault | None:
    kind, _, rest = text.partition("@")
    if kind not in _TARGET:
        problems.append(f"{text!r}: unknown kind {kind!r}. {did_you_mean(kind, _TARGET)}")
        return None
    scope = _TARGET[kind]
    before = len(problems)
    values: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in (scope, "step", "phase"):
            problems.append(f"{text!r}: unknown key {key!r}. {did_you_mean(key, (scope, 'step', 'phase'))}")
        elif key in values:
            problems.append(f"{text!r}: {key} is given twice.")
        values[key] = value
    phase = values.get("phase", "step_begin")
    if phase not in get_args(Phase):
        problems.append(f"{text!r}: unknown phase {phase!r}. {did_you_mean(phase, get_args(Phase))}")
    if kind in _WITHIN_A_STEP and "phase" in values:
        problems.append(f"{text!r}: {kind} takes no phase; it acts within a step.")
    if phase == "restore" and "step" in values:
        problems.append(f"{text!r}: phase=restore takes no step; it is the first restore of the run.")
    target = _number(text, scope, values, 0, problems)
    step = 0 if phase == "restore" else _number(text, "step", values, 1, problems)
    if len(problems) > before:
        return None
    return Fault(kind=kind, target=target, step=step, phase=phase)  # type: ignore[arg-type]


def _number(text: str, key: str, values: dict[str, str], least: int, problems: list[str]) -> int | None:
    """The number under ``key``; None for ``random``, and where a problem was found."""
    value = values.get(key)
    if value == RANDOM:
        return None
    if value is None:
        problems.append(f"{text!r}: {key} is missing (a number, or {RANDOM}).")
    elif not value.isdecimal() or int(value) < least:
        problems.append(f"{text!r}: {key}={value} is not a whole number from {least}, nor {RANDOM}.")
    else:
        return int(value)
    return None


def resolve(
    texts: Sequence[str], *, seed: int, steps: int, checkpoint_every: int, nodes: int, world_size: int, pp: int = 1
) -> tuple[str, ...]:
    """Check faults against a run and replace ``random``.

    A random step lies after the first commit and before the end, so that something is lost and something remains.

    Args:
        texts: Faults in the grammar above.
        seed: Chooses what is random; the result is a pure function of the arguments.
        steps: Optimizer steps of the run.
        checkpoint_every: Steps between checkpoints; 0 leaves only the one after the last step.
        nodes: Nodes of the gang, without spares.
        world_size: Ranks of the gang.
        pp: Pipeline stages.

    Returns:
        The faults in their canonical form, without ``random``.

    Raises:
        ConfigError: Lists every mistake and every value out of range.
    """
    saved = sorted({*(range(checkpoint_every, steps + 1, checkpoint_every) if checkpoint_every > 0 else ()), steps})
    problems: list[str] = []
    resolved = []
    for number, fault in enumerate(parse(texts)):
        size = world_size if fault.scope == "rank" else nodes
        first = world_size - world_size // pp if fault.kind == "loss_spike" else 0  # stages are the outermost axis
        last = steps - (fault.kind == "bad_update")  # the next step must show it
        draw = f"{seed}|{number}|{fault}"
        if fault.kind == "rank_deadlock" and world_size < 2:
            problems.append(f"{str(fault)!r}: a rank that is alone waits for nobody.")
        if fault.target is None:
            fault = replace(fault, target=_draw(f"{draw}|target", range(first, size)))
        elif not first <= fault.target < size:
            there = "in the last stage are" if first else "there are"
            problems.append(f"{str(fault)!r}: {there} {fault.scope}s {first} to {size - 1}.")
        if fault.step is None:
            fault = replace(fault, step=_random_step(fault, f"{draw}|step", last, saved, problems))
        elif fault.kind in _SPIKES and fault.step <= LEAST_SEEN:
            problems.append(f"{str(fault)!r}: nothing is called a spike before {LEAST_SEEN} losses were seen.")
        elif fault.step > last:
            problems.append(f"{str(fault)!r}: the run has {steps} steps, and it must show in one of them.")
        elif fault.phase in _SAVING and fault.step not in saved:
            near = sorted(saved, key=lambda step: abs(step - (fault.step or 0)))[:2]
            nearest = " or ".join(map(str, sorted(near)))
            problems.append(f"{str(fault)!r}: no checkpoint is made at that step; the nearest: {nearest}.")
        resolved.append(str(fault))
    _refuse(problems)
    return tuple(resolved)


def _random_step(fault: Fault, draw: str, steps: int, saved: list[int], problems: list[str]) -> int:
    first = saved[0]
    if fault.phase in _SAVING:
        choice = saved[1:]
    else:
        # step first+1 would lose nothing that was done since the commit
        first = max(first, LEAST_SEEN) if fault.kind in _SPIKES else first
        choice = list(range(first + 2, steps + 1)) or list(range(first + 1, steps + 1))
    if choice:
        return _draw(draw, choice)
    what = f"the first {LEAST_SEEN} losses and the first commit" if fault.kind in _SPIKES else "the first commit"
    problems.append(
        f"{str(fault)!r}: a random step lies after {what}, which is made after step {first} of {steps}; "
        f"set checkpoint.every to {max(1, steps // 2)} or less, or more train.steps."
    )
    return 0


def _draw(text: str, choice: Sequence[int]) -> int:
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return choice[number % len(choice)]


class FaultInjector:
    """Carries out the faults of one rank; implements :class:`jobs.hooks.Hooks`.

    A fault on a node is carried out by the lowest rank of that node. Before a fault acts, its proof
    (``faults/<id>.json``) is created exclusively and made durable; where the proof exists, it does not act again.

    Args:
        texts: All faults of the run, resolved.
        env: This rank.
        reporter: Where ``fault`` is reported.

    Raises:
        ConfigError: A fault cannot be read.
    """

    def __init__(self, texts: Sequence[str], env: RankEnv, reporter: Reporter) -> None:
        self._env = env
        self._reporter = reporter
        self._folder = RunPaths(env.run_dir).faults
        self._model: Any = None
        self._spoiled: list[Removable] = []
        self._drag = Drag()
        self._mine = [(name, fault) for name, fault in named(texts) if self._concerns(fault)]

    def _concerns(self, fault: Fault) -> bool:
        if fault.scope == "rank":
            return fault.target == self._env.rank
        return fault.target == self._env.node_rank and self._env.local_rank == 0

    def model_ready(self, module: Any) -> None:
        """See :class:`jobs.hooks.Hooks`."""
        self._model = module

    def step_begin(self, step: int) -> None:
        """See :class:`jobs.hooks.Hooks`."""
        self._reached("step_begin", step)
        self._drag.step_begin()

    def step_end(self, step: int) -> None:
        """See :class:`jobs.hooks.Hooks`."""
        while self._spoiled:
            self._spoiled.pop().remove()
        self._drag.step_end()
        self._reached("step_end", step)

    def checkpoint_begin(self, step: int) -> None:
        """See :class:`jobs.hooks.Hooks`."""
        self._reached("checkpoint", step)

    def holds_commit(self, step: int) -> bool:
        """See :class:`jobs.hooks.Hooks`."""
        return any((fault.phase, fault.step) == ("shards_written", step) for _, fault in self._mine)

    def checkpoint_shards_written(self, step: int) -> None:
        """See :class:`jobs.hooks.Hooks`."""
        self._reached("shards_written", step)

    def restore_begin(self) -> None:
        """See :class:`jobs.hooks.Hooks`."""
        self._reached("restore", 0)

    def _reached(self, phase: Phase, step: int) -> None:
        for name, fault in self._mine:
            if (fault.phase, fault.step) == (phase, step) and not (self._folder / f"{name}.json").exists():
                self._fire(name, fault, step)
                if fault.kind in NUMERIC:
                    return  # one blow-up at a time: an equal fault is for the next attempt

    def _fire(self, name: str, fault: Fault, step: int) -> None:
        roots = self._roots(fault)
        victims = roots if fault.kind == "agent_kill" else sorted({*descendants(roots), os.getpid()})
        if not self._prove(name, fault, step, victims):
            return
        self._reporter.send("fault", fault=str(fault), id=name, step=step)
        match fault.kind:
            case "rank_error":
                raise InjectedFault(f"injected fault: {fault}")
            case "device_lost":
                raise InjectedFault(f"CUDA error: GPU has fallen off the bus (injected fault: {fault})")
            case "rank_exit":
                os._exit(RANK_EXIT_CODE)
            case "rank_stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "rank_spin":
                hold_the_interpreter()
            case "rank_deadlock":
                go_astray()
            case "rank_slow":
                self._drag.begin(self._model)
            case "nan_grad" | "loss_spike" | "bad_update":
                self._spoiled.append(spoil(fault.kind, self._model))
            case "agent_kill":
                os.kill(roots[0], signal.SIGKILL)
            case "rank_kill":
                os.kill(os.getpid(), signal.SIGKILL)
                wait_for_death()
            case "node_kill":
                kill_own_trees([*roots, os.getpid()])
                wait_for_death()

    def _roots(self, fault: Fault) -> list[int]:
        """Tops of the process trees that the fault kills, beside this process."""
        if fault.scope == "rank":
            return []
        raylet = [process.pid for process in ancestors(os.getpid()) if process.name == "raylet"]
        agent = [int(os.environ[AGENT_PID])] if os.environ.get(AGENT_PID, "").isdecimal() else []
        if not agent:
            raise ConfigError(
                f"The fault {fault} cannot be injected: this rank does not know its host agent.",
                why=f"{AGENT_PID} is not set.",
                hint="Faults on nodes and agents need ranks that a host agent started.",
            )
        return agent if fault.kind == "agent_kill" else [*raylet, *agent]

    def _prove(self, name: str, fault: Fault, step: int, victims: list[int]) -> bool:
        """Create the proof; False when it exists, which means that the fault has fired before."""
        proof = {
            "fault": str(fault),
            "id": name,
            "rank": self._env.rank,
            "node_rank": self._env.node_rank,
            "attempt": self._env.attempt,
            "step": step,
            "pid": os.getpid(),
            "victims": victims,
            "time": time.time(),
            "hostname": socket.gethostname(),
        }
        path = self._folder / f"{name}.json"
        aside = self._folder / f".{name}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(aside, json.dumps(proof).encode() + b"\n")
            return name_exclusively(aside, path)
        except OSError as error:
            raise StorageError(
                f"The proof of an injected fault cannot be written: {path}.",
                why=f"{error.strerror or error}.",
                hint="Check the run directory; faults=[] switches injection off.",
            ) from error


def named(texts: Sequence[str]) -> list[tuple[str, Fault]]:
    """Faults with the names of their proofs; the second of two equal faults gets ``.2``, and so on."""
    seen: dict[str, int] = {}
    result = []
    for fault in parse(texts):
        name = str(fault).replace("@", ".").replace("=", "-").replace(",", ".")
        seen[name] = seen.get(name, 0) + 1
        result.append((name if seen[name] == 1 else f"{name}.{seen[name]}", fault))
    return result
