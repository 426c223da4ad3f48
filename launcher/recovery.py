"""Classify failures and decide what to do about them. Pure: evidence in, a value out; the controller acts."""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.request import RecoverySpec
from launcher.run import Run
from strategies.schedule import Skip


class FailureKind(enum.StrEnum):
    """What went wrong; the member order is the order of suspicion (see :func:`culprit`)."""

    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    NUMERIC = "numeric"  # training has blown up: a NaN, or a spike of the loss
    NODE_LOST = "node_lost"
    PREEMPTED = "preempted"
    HANG = "hang"
    RANK_KILLED = "rank_killed"
    RANK_ERROR = "rank_error"
    RANK_EXIT = "rank_exit"
    START_TIMEOUT = "start_timeout"
    SECONDARY = "secondary"  # a rank that failed because a peer was gone


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
        """What the event log keeps of the failure that explains the others."""
        named = {"cause": self.detail, "failure": self.kind.value, "signature": self.signature}
        return {**named, "node": self.node, "rank": self.rank}


class Action(enum.StrEnum):
    """What the controller does next."""

    RESTART = "restart"
    SHRINK = "shrink"
    GROW = "grow"
    GIVE_UP = "give_up"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """A decision with its reason, and the samples to leave out from now on, if any."""

    action: Action
    reason: str
    delay_s: float = 0.0
    skip: Skip | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """What the event log keeps of it."""
        return {"action": self.action.value, "reason": self.reason, "delay_s": self.delay_s, "skip": self.skip}


# What torch, gloo, NCCL and DeepSpeed say when the other end of a connection went away.
_PEER_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|peer|gloo|nccl|timed out waiting|socket|DistBackendError"
    r"|store->get|wait timeout|recvValue|sendBytes",
    re.IGNORECASE,
)
_COMMUNICATION = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
# What differs between two attempts that meet the same error: addresses, ports, process ids, names that carry the token.
_ADDRESS = re.compile(r"0x[0-9a-f]+|pid[= ]\d+|:\d{4,5}\b|e\d{4}-a\d{4}|attempts/\d+|attempt \d+", re.IGNORECASE)


def classify_exit(data: Mapping[str, Any], *, node: str, when: float, error: Mapping[str, Any] | None) -> Failure:
    """Name the failure behind a rank's exit.

    Args:
        data: The agent's exit event: ``rank``, ``code``, ``signal``, ``log_tail``.
        node: Node of the rank.
        when: When it was seen.
        error: The ``error`` report that the rank sent before, if any.
    """
    rank, signal = int(data["rank"]), data.get("signal")
    if error is not None:
        return _classify_error(error, rank=rank, node=node, when=when)
    tail = str(data.get("log_tail", ""))
    if signal:
        detail = f"rank {rank} on {node} was ended by signal {signal}"
        return Failure(kind=FailureKind.RANK_KILLED, time=when, node=node, rank=rank, detail=detail)
    last = last_error_line(tail)
    detail = f"rank {rank} on {node} exited with code {data.get('code')}" + (f": {last}" if last else "")
    if last and _PEER_GONE.search(last):
        return Failure(kind=FailureKind.SECONDARY, time=when, node=node, rank=rank, detail=detail)
    signature = _signature(last, 0) if last else ""
    return Failure(kind=FailureKind.RANK_EXIT, time=when, node=node, rank=rank, detail=detail, signature=signature)


def _classify_error(error: Mapping[str, Any], *, rank: int, node: str, when: float) -> Failure:
    kind, message, step = str(error.get("type", "")), str(error.get("message", "")), int(error.get("step") or 0)
    detail = f"rank {rank} on {node} failed at step {step}: {kind}: {message.splitlines()[0] if message else ''}"
    if kind in ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError") and _PEER_GONE.search(
        message
    ):
        return Failure(kind=FailureKind.SECONDARY, time=when, node=node, rank=rank, step=step, detail=detail)
    trace = str(error.get("traceback", "")) or message
    return Failure(
        kind=FailureKind.RANK_ERROR,
        time=when,
        node=node,
        rank=rank,
        step=step,
        detail=detail,
        signature=_signature(f"{kind}: {message}\n{trace}", step),
    )


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


def decide(run: Run, failure: Failure, spec: RecoverySpec) -> Decision:
    """Restart or give up.

    Args:
        run: The run, its newest failure already folded in.
        failure: The cause.
        spec: Budget and patience.
    """
    if failure.signature and run.signatures.count(failure.signature) >= spec.same_error_limit:
        return Decision(
            action=Action.GIVE_UP,
            reason=f"the same error at the same step {run.signatures.count(failure.signature)} times: {failure.detail}",
        )
    skip = _skip_for(failure)
    if skip is not None and any(earlier.step == skip.step for earlier in run.skips):
        return Decision(
            action=Action.GIVE_UP,
            reason=f"{failure.detail}, again with other samples: it is not the data. A lower learning rate (train.lr) "
            "may help; train.spike_sigmas=0 takes spikes as they come",
        )
    if run.restarts >= spec.max_restarts:
        return Decision(
            action=Action.GIVE_UP,
            reason=f"all {spec.max_restarts} restarts are used (recovery.max_restarts); last: {failure.detail}",
        )
    delay = 0.0
    if run.idle_restarts:
        delay = min(spec.backoff_max_s, spec.backoff_s * 2 ** (run.idle_restarts - 1))
    return Decision(action=Action.RESTART, reason=failure.detail, delay_s=delay, skip=skip)


def _skip_for(failure: Failure) -> Skip | None:
    """The samples of the step that blew up; they are passed over once the run is back before it."""
    if failure.kind is not FailureKind.NUMERIC:
        return None
    return Skip(step=failure.step, samples=failure.samples)


def at_step(failure: Failure, step: int) -> Failure:
    """The failure with the step filled in where the rank could not tell it, its signature bound to that step."""
    if failure.step:
        return failure
    signature = _signature(failure.signature, step) if failure.signature else ""
    return replace(failure, step=step, signature=signature)
