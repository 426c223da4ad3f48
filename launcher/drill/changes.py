"""How a rehearsal differs from its experiment, key by key, and what of it is the same. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.render import table
from launcher.schema import Config
from strategies.codec import to_json
from strategies.plan import ParallelPlan

_PLAN = (
    "tp",
    "pp",
    "dp",
    "ep",
    "sp",
    "cp",
    "zero_stage",
    "schedule",
    "vpp",
    "recompute",
    "grad_dtype",
    "offload",
    "offload_path",
    "sequence_parallel",
    "flash",
    "micro_batch",
    "grad_accum",
)
_GROUPS = ("model", "data", "cluster", "train", "checkpoint", "recovery", "tracking", "planner", "experiment")
# Names for people, where the machine is, and what computes: that is found out, not configured.
_UNSHOWN = ("model.name", "cluster.name", "cluster.address", "cluster.device")
_TOLD = ("strategy", "model", "train", "checkpoint")
_ALWAYS = ("strategy.zero_stage", "strategy.recompute", "model.tied", "checkpoint.memory_every")
_SELDOM = (
    "model.norm_eps",
    "model.init_std",
    "train.beta1",
    "train.beta2",
    "train.eps",
    "train.weight_decay",
    "train.deterministic",
    "train.spike_sigmas",
    "checkpoint.keep",
)
_WIDTH = 116
_LONGEST = 36


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One value of the experiment that is another in the rehearsal.

    Attributes:
        key: Its configuration key.
        was: In the experiment.
        now: In the rehearsal.
        why: Why it is another, where it is not just smaller.
    """

    key: str
    was: Any
    now: Any
    why: str = ""


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with dotted keys changed."""
    for key, value in changes.items():
        group, _, name = key.partition(".")
        changed: dict[str, Any] = {group: replace(getattr(config, group), **{name: value})}
        config = replace(config, **changed)
    return config


def value_of(config: Config, key: str) -> Any:
    """What a dotted key says."""
    group, _, name = key.partition(".")
    return getattr(getattr(config, group), name)


def shown(config: Config, plan: ParallelPlan) -> dict[str, Any]:
    """Key -> value of what makes a run what it is, the plan's values resolved."""
    tree = to_json(config)
    found = {f"{group}.{key}": value for group in _GROUPS for key, value in tree[group].items()}
    found = {key: value for key, value in found.items() if key not in _UNSHOWN}
    resolved = {f"strategy.{key}": getattr(plan, key) for key in _PLAN}
    uneven = list(plan.stages) if len({*plan.stages}) > 1 else None
    return resolved | {"strategy.stages": uneven} | found


def differences(before: Mapping[str, Any], after: Mapping[str, Any], why: Mapping[str, str]) -> tuple[Change, ...]:
    """Every value that is another.

    Args:
        before: Of the experiment (:func:`shown`).
        after: Of the rehearsal.
        why: Reasons by key.
    """
    pairs = _pairs(before, after)
    return tuple(Change(key=key, was=was, now=now, why=why.get(key, "")) for key, was, now in pairs if was != now)


def unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What both say alike."""
    return {key: was for key, was, now in _pairs(before, after) if was == now}


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Key, and what either side says of it; a value with parts that both sides have is taken part by part."""
    for key, was in before.items():
        now = after.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from _pairs(was, now, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", was, now


# ---- for people -------------------------------------------------------------------------------------------------


def changes_text(changes: Sequence[Change]) -> str:
    """What the rehearsal has smaller than the experiment, as a diff."""
    if not changes:
        return "nothing is smaller than in the experiment"
    rows = [(one.key, _short(one.was), _short(one.now), one.why) for one in changes]
    return table(("CHANGED", "EXPERIMENT", "REHEARSAL", "WHY, IF NOT JUST SMALLER"), rows)


def same_text(same: Mapping[str, Any]) -> str:
    """What is the same, in a few lines of ``key=value``: what says something, and how many more."""
    told = [key for key, value in same.items() if _tells(key, value)]
    words = [f"{key}={_short(same[key])}".replace(" ", "") for key in told]
    text = f"the same: {' '.join(words)} and {len(same) - len(told)} more (--json has all)"
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _tells(key: str, value: Any) -> bool:
    if key in _ALWAYS or key in _SELDOM:
        return key in _ALWAYS
    plain = value in (None, 0, 1, "", "none", [], ()) and value is not True
    return key.partition(".")[0] in _TOLD and not plain


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['experts']} experts" if "experts" in value else "set"
    if isinstance(value, (list, tuple)):
        parts = [str(one) for one in value]
        return ", ".join(parts if len(parts) <= 4 else [*parts[:2], "...", parts[-1]]) or "-"
    if isinstance(value, bool):
        return str(value).lower()
    text = "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"...{text[3 - _LONGEST :]}"  # a path: its end tells more
