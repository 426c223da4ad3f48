"""What a failure was, and what can be done about one. Pure: evidence in, a value out; the controller acts."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.devices import Trouble, ambiguous, last_words, trouble
from launcher.rollback import Rollback
from strategies.schedule import Skip


class FailureKind(enum.StrEnum):
    """What went wrong; the member order is the order of suspicion (see :func:`culprit`)."""

    BAD_CONFIG = "bad_config"  # a rank refuses what it was told to do: another try ends alike
    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    NUMERIC = "numeric"  # training has blown up: a NaN, or a spike of the loss
    NODE_LOST = "node_lost"
    PARTITIONED = "partitioned"  # silent with nothing closed: cut off, frozen, or without power
    PREEMPTED = "preempted"
    DEVICE_LOST = "device_lost"  # gone, or it cannot be taken
    DEVICE_FAULT = "device_fault"
    OUT_OF_MEMORY = "out_of_memory"
    HANG = "hang"
    RANK_KILLED = "rank_killed"
    UNSAVED = "unsaved"  # the last checkpoint of the run could not be written for as long as it is tried
    RANK_ERROR = "rank_error"
    RANK_EXIT = "rank_exit"
    START_TIMEOUT = "start_timeout"
    STRAGGLER = "straggler"  # slow, and therefore all are; nothing has failed
    UNREACHABLE = "unreachable"  # what is to be restored cannot be had: who holds it is gone or too slow
    LINK_FAULT = "link_fault"  # devices cannot talk to each other, and nobody is known to be gone
    SECONDARY = "secondary"  # a rank that failed because a peer was gone


BUDGET_OF: dict[FailureKind, str] = {
    FailureKind.CORRUPT_CHECKPOINT: "storage",
    FailureKind.NUMERIC: "numeric",
    FailureKind.NODE_LOST: "hardware",
    FailureKind.PARTITIONED: "hardware",
    FailureKind.PREEMPTED: "preemption",
    FailureKind.DEVICE_LOST: "hardware",
    FailureKind.DEVICE_FAULT: "hardware",
    FailureKind.OUT_OF_MEMORY: "memory",
    FailureKind.HANG: "hang",
    FailureKind.RANK_KILLED: "hardware",
    FailureKind.UNSAVED: "error",
    FailureKind.RANK_ERROR: "error",
    FailureKind.RANK_EXIT: "error",
    FailureKind.START_TIMEOUT: "start",
    FailureKind.UNREACHABLE: "hardware",
    FailureKind.LINK_FAULT: "hardware",
    FailureKind.SECONDARY: "hardware",
}
"""Which of :class:`launcher.request.Budgets` a restart is taken from; bad configuration is never tried again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One piece of evidence.

    Attributes:
        kind: What went wrong.
        time: When it was seen (UTC seconds).
        node: Node it happened on, or "".
        rank: Rank it happened to, or -1.
        step: Step at which it happened, or 0 when unknown.
        detail: One sentence for people.
        signature: Equal for equal deterministic errors at the same step; "" when it may be chance.
        path: The checkpoint (``corrupt_checkpoint`` only).
        samples: How many samples the step was made of (``numeric`` only).
    """

    kind: FailureKind
    time: float
    node: str = ""
    rank: int = -1
    step: int = 0
    detail: str = ""
    signature: str = ""
    path: str = ""
    samples: int = 0

    @property
    def verdict(self) -> dict[str, Any]:
        """What the event log keeps of the failure that explains the others: all that :func:`decide` needs."""
        named = {"cause": self.detail, "failure": self.kind.value, "signature": self.signature}
        return {**named, "node": self.node, "rank": self.rank, "step": self.step, "samples": self.samples}


class Action(enum.StrEnum):
    """What the controller does next.

    One rung is not built: new communicators in the processes that survive. It would save them a new context on the
    device.
    """

    RESTART = "restart"  # new ranks, as soon as there are nodes for them
    SWAP = "swap"  # a spare takes the place of a node
    WAIT = "wait"  # for nodes, or for checkpoints that are away
    SHRINK = "shrink"  # go on with a smaller plan
    GROW = "grow"  # leave at the next checkpoint, for a larger plan
    REPLACE = "replace"  # leave at the next checkpoint, for a node that is not slow
    LEAVE = "leave"  # leave after a step that all ranks know: a node will be taken away
    ADOPT = "adopt"  # take over what lives
    GIVE_UP = "give_up"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A decision with its reason, and after a blow-up the samples to leave out, or how far back the run goes."""

    action: Action
    reason: str
    delay_s: float = 0.0
    skip: Skip | None = None
    rollback: Rollback | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What the event log keeps of it."""
        found = {"action": self.action.value, "reason": self.reason, "delay_s": self.delay_s, "skip": self.skip}
        return found if self.rollback is None else {**found, "rollback": self.rollback}


# What torch, gloo, NCCL and DeepSpeed say when the other end of a connection went away.
_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|peer|gloo|nccl|timed out waiting|socket|DistBackendError"
    r"|store->get|wait timeout|recvValue|sendBytes",
    re.IGNORECASE,
)
_COMMUNICATION = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|_STATUS_ALLOC_FAILED", re.IGNORECASE
)
_REFUSALS = ("ConfigError", "PlanInfeasible", "ResumeRefused")  # of strategies.errors: what a rank makes of its job
_OUT_OF_REACH, _UNSAVED = "OutOfReach", "Unsaved"  # of jobs.checkpoint.errors
_TROUBLE = {
    Trouble.GONE: FailureKind.DEVICE_LOST,
    Trouble.FAULT: FailureKind.DEVICE_FAULT,
    Trouble.LINK: FailureKind.LINK_FAULT,
}
_SIGABRT = 6
# What differs between two attempts that meet the same error: addresses, ports, process ids, names that carry the token
# or the rank: which of several ranks is the first to say it is chance.
_ADDRESS = re.compile(
    r"0x[0-9a-f]+|pid[= ]\d+|:\d{4,5}\b|e\d{4}-a\d{4}|attempts/\d+|attempt \d+|shard-\d+", re.IGNORECASE
)


def classify_exit(data: Mapping[str, Any], *, node: str, when: float, error: Mapping[str, Any] | None) -> Failure:
    """Name the failure behind a rank's exit.

    Args:
        data: The agent's exit event: ``rank``, ``code``, ``signal``, ``log_tail``; ``oom``: what speaks for it that
            the kernel has killed the rank for want of memory (:mod:`launcher.host.oom`), or "".
        node: Node of the rank.
        when: When it was seen.
        error: The ``error`` report that the rank sent before, if any.
    """
    rank = int(data["rank"])
    if error is not None:
        return _classify_error(error, rank=rank, node=node, when=when)
    found = Failure(kind=FailureKind.RANK_EXIT, time=when, node=node, rank=rank)
    if starved := str(data.get("oom", "")):
        return _starved(data, found, starved)
    if data.get("signal"):
        return _classify_signal(data, found)
    last = last_error_line(str(data.get("log_tail", "")))
    found = replace(found, detail=f"rank {rank} on {node} exited with code {data.get('code')}" + (last and f": {last}"))
    if known := _not_the_programs(last):
        return _signed(replace(found, kind=known), last)
    return replace(found, signature=_signature(last, 0) if last else "")


def _signed(found: Failure, said: str) -> Failure:
    """With a signature if a device has failed in a way that the program may have caused."""
    words = ambiguous(said) if found.kind is FailureKind.DEVICE_FAULT else ""
    return replace(found, signature=_signature(f"device: {words}", found.step)) if words else found


def _starved(data: Mapping[str, Any], found: Failure, why: str) -> Failure:
    signal = data.get("signal")
    how = f"was ended by signal {signal}" if signal else f"exited with code {data.get('code')}"
    detail, signature = f"rank {found.rank} on {found.node} {how}; {why}", _signature("killed for want of memory", 0)
    return replace(found, kind=FailureKind.OUT_OF_MEMORY, detail=detail, signature=signature)


def _classify_signal(data: Mapping[str, Any], found: Failure) -> Failure:
    signal, kind = int(data["signal"]), FailureKind.RANK_KILLED
    detail = f"rank {found.rank} on {found.node} was ended by signal {signal}"
    if signal == _SIGABRT and (said := last_words(str(data.get("log_tail", "")))):
        kind, detail = _not_the_programs(said) or kind, f"{detail}: {_in_a_line(said)}"
        return _signed(replace(found, kind=kind, detail=detail), said)
    return replace(found, kind=kind, detail=detail)


def _not_the_programs(said: str) -> FailureKind | None:
    """What the last words of a rank tell, if it is a device, a link or a peer that has failed."""
    if _NO_MEMORY.search(said):
        return None
    if wrong := trouble(said.partition(":")[0].rpartition(".")[2], said):
        return _TROUBLE[wrong]
    return FailureKind.SECONDARY if _PEER_GONE.search(said) else None


def _classify_error(error: Mapping[str, Any], *, rank: int, node: str, when: float) -> Failure:
    kind, message, step = str(error.get("type", "")), str(error.get("message", "")), int(error.get("step") or 0)
    detail = f"rank {rank} on {node} failed at step {step}: {kind}: {_in_a_line(message)}"
    found = Failure(kind=FailureKind.RANK_ERROR, time=when, node=node, rank=rank, step=step, detail=detail)
    trace = str(error.get("traceback", "")) or message
    if kind in ("OutOfMemoryError", "MemoryError") or _NO_MEMORY.search(message):
        # how much was free differs from one time to the next, where it was asked for does not
        frames = "\n".join(line for line in trace.splitlines() if line.lstrip().startswith("File "))
        return replace(found, kind=FailureKind.OUT_OF_MEMORY, signature=_signature(f"memory\n{frames}", step))
    signature = _signature(f"{kind}: {message}\n{trace}", step)
    if kind in _REFUSALS:
        return replace(found, kind=FailureKind.BAD_CONFIG, signature=signature)
    if kind == _UNSAVED:
        return replace(found, kind=FailureKind.UNSAVED, signature=signature)
    if kind == _OUT_OF_REACH:
        return replace(found, kind=FailureKind.UNREACHABLE)
    if wrong := trouble(kind, message, trace):
        return _signed(replace(found, kind=_TROUBLE[wrong]), message)
    if kind in _COMMUNICATION and _PEER_GONE.search(message):
        return replace(found, kind=FailureKind.SECONDARY)
    return replace(found, signature=signature)


def _in_a_line(message: str) -> str:
    """What an error says first and, of one of our own, why."""
    first, *more = message.splitlines() or [""]
    why = next((line.removeprefix("  why:").strip() for line in more if line.startswith("  why:")), "")
    return f"{first} ({why})" if why else first


def deserted(step: int, steps: int, when: float) -> Failure:
    """Every rank has exited well after ``step`` of ``steps``, and nobody had asked them to: the next ones may, too."""
    detail = f"all ranks exited with code 0 after step {step} of {steps}, and nobody had asked them to leave"
    signature = _signature("deserted", step)
    return Failure(kind=FailureKind.RANK_EXIT, time=when, step=step + 1, detail=detail, signature=signature)


def last_error_line(tail: str) -> str:
    """The exception line of the last traceback in a log, or "" if there is none."""
    if "Traceback (most recent call last)" not in tail:
        return ""
    lines = tail.rsplit("Traceback (most recent call last)", 1)[1].splitlines()
    named = [line for line in lines if line and not line.startswith((" ", ":", "["))]
    return named[0].strip() if named else ""


def _signature(text: str, step: int) -> str:
    return hashlib.sha256(f"{step}|{_ADDRESS.sub('?', text)}".encode()).hexdigest()[:16]


def culprit(evidence: Sequence[Failure]) -> Failure:
    """The failure that explains the others: the most suspicious kind, and the earliest of it.

    When one rank falls, its peers fail too, with connection errors; these never outrank a first cause.
    """
    order = list(FailureKind)
    return min(evidence, key=lambda failure: (order.index(failure.kind), failure.time, failure.rank))


def at_step(failure: Failure, step: int) -> Failure:
    """The failure with the step filled in where the rank could not tell it, its signature bound to that step."""
    if failure.step:
        return failure
    signature = _signature(failure.signature, step) if failure.signature else ""
    return replace(failure, step=step, signature=signature)
