"""What a fault must have come to beyond being noticed, read from the records of its rehearsal. Each says what is wrong.

Bounds in seconds and in steps that many faults share are in :mod:`launcher.drill.bounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.checkpoint import read_manifest
from jobs.checkpoint.layout import manifests
from launcher.render import plural, seconds
from launcher.run import EventKind
from launcher.store import RunStore

if TYPE_CHECKING:
    from launcher.drill.case import Aim

NAMED_WITHIN = 20  # steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a rehearsal has left.

    Attributes:
        store: The run.
        aim: Where the fault struck.
        records: Of what was done, by whom it may be, the relief included, oldest first.
    """

    store: RunStore
    aim: Aim
    records: Sequence[Mapping[str, Any]]


def named_soon(facts: Facts) -> str:
    """A rank that has become slow is named within :data:`NAMED_WITHIN` steps."""
    found = [event.data["failure"] for event in facts.store.events() if event.kind is EventKind.STRAGGLER_FOUND]
    since = facts.aim.step
    steps = [int(one["step"]) - since for one in found if one["rank"] == facts.aim.rank and one["step"] >= since]
    if not steps or min(steps) <= NAMED_WITHIN:
        return ""
    return f"named after {plural(min(steps), 'step')}, and must be within {NAMED_WITHIN}"


def left_in_time(facts: Facts) -> str:
    """The ranks of a node that is told to leave have left in good order, before it would have ended them."""
    grace_s, told = facts.store.request().recovery.preempt_grace_s, float(_acts(facts)[0]["time"])
    ends = [event for event in facts.store.events() if event.kind is EventKind.GANG_STOPPED and event.time >= told]
    if not ends or ends[0].data.get("failure"):
        return "the ranks have not left in good order"
    if ends[0].time - told > grace_s:
        return f"the ranks were gone after {seconds(ends[0].time - told)}, and must be within {seconds(grace_s)}"
    first, *later = facts.store.run().attempts
    node = first.nodes[facts.aim.node]
    return f"{node} carries ranks again" if any(node in attempt.nodes for attempt in later) else ""


def outlived(facts: Facts) -> str:
    """The others have trained on after the link came up, and who was cut off has committed nothing since."""
    cut, healed_s = int(_acts(facts)[0]["attempt"]), float(_acts(facts)[-1]["done"])
    if not any(line["attempt"] > cut and line["time"] > healed_s for line in facts.store.metrics()):
        return "no step was made after the link had come up"
    old = [one for one in manifests(facts.store.paths.checkpoint_dir) if one.token.attempt <= cut]
    late = sorted(one.step for one in old if read_manifest(one.manifest).time > healed_s)
    return f"committed by who was cut off: step {', '.join(map(str, late))}" if late else ""


def _acts(facts: Facts) -> list[Mapping[str, Any]]:
    """The records of the drill's own acts, in their order."""
    return [one for one in facts.records if str(one["id"]).startswith("drill.")]
