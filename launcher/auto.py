"""``strategy=auto``: from a configuration to the searched space, the best plan, and what is said about the others.

What the configuration fixes (``strategy.tp=8``) stays fixed, everything else is searched. Documents have stable keys
that say their unit, as those of :mod:`launcher.estimation`.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from launcher import build
from launcher.quantities import storage
from launcher.schema import Config
from strategies import rules
from strategies.codec import to_json
from strategies.errors import ConfigError, PlanInfeasible, Violation, did_you_mean
from strategies.estimate import CostEstimate, Estimator, Objective
from strategies.plan import GradDtype, Offload, ParallelPlan, Recompute, Schedule
from strategies.resolve import resolve_plan
from strategies.search import SearchResult, search
from strategies.space import KNOBS, Space
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec
from strategies.workload import Workload

TOP = 5
"""Plans that are ranked unless told otherwise."""

_WORDS: dict[str, tuple[object, ...]] = {
    "schedule": get_args(Schedule),
    "recompute": get_args(Recompute),
    "grad_dtype": get_args(GradDtype),
    "offload": get_args(Offload),
    "flash": (True, False),
    "sequence_parallel": (True, False),
    "zero_stage": (0, 1, 2, 3),
}


def best_plan(config: Config, model: ModelSpec, batch: BatchSpec, machine: ClusterSpec) -> ParallelPlan:
    """The best plan that phalanx can run; for what it cannot run at all, the best that can be modelled.

    Args:
        config: The configuration.
        model: Its model.
        batch: Its batch.
        machine: Its machine, as configured or as measured.

    Raises:
        ConfigError: The cluster has no hardware figures.
        PlanInfeasible: No plan is legal, or none fits.
    """
    return chosen(_searched(config, _work(config, model, batch, machine), TOP))


def chosen(result: SearchResult) -> ParallelPlan:
    """The best plan that phalanx can run; for what it cannot run at all, the best that can be modelled."""
    return (result.best_runnable or result.ranked[0]).plan


def searched(config: Config, *, top: int = TOP, machine: ClusterSpec | None = None) -> SearchResult:
    """Search; arguments and errors as :func:`auto_document`."""
    return _searched(config, _configured(config, machine), top)


def auto_document(
    config: Config, *, top: int = TOP, machine: ClusterSpec | None = None, result: SearchResult | None = None
) -> dict[str, Any]:
    """The ranking, and what became of the rest of the space.

    Args:
        config: The configuration.
        top: How many plans to rank.
        machine: What an existing cluster reported; None takes the configuration's numbers.
        result: The search, if it was made already.

    Raises:
        ConfigError: The cluster has no hardware figures.
        PlanInfeasible: No plan is legal, or none fits.
    """
    result = result or searched(config, top=top, machine=machine)
    ranked = result.ranked[:top]
    return {
        "objective": result.objective,
        "space": result.space,
        "evaluated": result.evaluated,
        "pruned": dict(result.pruned),
        "rejected": dict(result.rejected),
        "fixed": to_json(_fixed(config, machine or build.cluster_spec(config))),
        "ranked": [summary(one) for one in ranked],
        "best_runnable": summary(result.best_runnable) if result.best_runnable else None,
        "runner_up": _lost(ranked[0], ranked[1], result.objective) if len(ranked) > 1 else None,
    }


def why_document(config: Config, fields: Mapping[str, str], *, machine: ClusterSpec | None = None) -> dict[str, Any]:
    """Why a plan is not the best one; what ``fields`` leave open is completed as well as possible.

    Args:
        config: The configuration.
        fields: Knobs and values as typed: ``{"tp": "4", "pp": "3"}``.
        machine: What an existing cluster reported.

    Raises:
        ConfigError: A knob or a value is not known, or the cluster has no hardware figures.
        PlanInfeasible: Not even the best plan exists.
    """
    work = _configured(config, machine)
    asked = parse_fields(fields)
    objective: Objective = config.objective
    best = _searched(config, work, TOP).ranked[0]
    estimator = Estimator(work)
    fixed = _fixed(config, work.cluster) | asked
    found = search(work, objective=objective, top=1, space=Space(work, fixed), estimator=estimator)
    document = {"asked": to_json(asked), "objective": objective, "best": summary(best), "violations": []}
    if found.ranked:
        verdict = "best" if found.ranked[0].plan == best.plan else "slower"
        lost = _lost(best, found.ranked[0], objective) if verdict == "slower" else None
        return document | {"verdict": verdict, "plan": summary(found.ranked[0]), "lost": lost}
    if found.closest is None:
        broken = _broken(work, fixed)
        return document | {"verdict": "illegal", "plan": None, "lost": None, "violations": to_json(broken)}
    lost = _lost(best, found.closest, objective)
    return document | {
        "verdict": "too_large",
        "plan": summary(found.closest),
        "lost": lost,
        "violations": to_json((_too_large(found.closest),)),
    }


def parse_fields(fields: Mapping[str, str], unread: Sequence[str] = ()) -> dict[str, object]:
    """Knobs with their values, from words.

    Args:
        fields: Knobs and values as typed.
        unread: What is wrong already, to be said with the rest.

    Raises:
        ConfigError: A knob or a value is not known; all of them are named.
    """
    found: dict[str, object] = {}
    wrong = list(unread)
    for name, word in fields.items():
        if name not in KNOBS:
            wrong.append(f"there is no '{name}'. {did_you_mean(name, KNOBS)}")
            continue
        choices = {str(value).lower(): value for value in _WORDS.get(name, ())}
        numbers = word.strip("[]").replace(":", " ").replace(",", " ").split()
        if choices:
            if word.lower() in choices:
                found[name] = choices[word.lower()]
            else:
                wrong.append(f"{name}={word}: {did_you_mean(word, choices)}")
        elif numbers and all(number.isdecimal() and int(number) > 0 for number in numbers):
            found[name] = tuple(map(int, numbers)) if name == "stages" else int(numbers[0])
            if name != "stages" and len(numbers) > 1:
                wrong.append(f"{name}={word}: one number is expected")
        else:
            wrong.append(f"{name}={word}: a whole number of 1 or more is expected")
    if wrong:
        raise ConfigError("--why: " + "; ".join(wrong), hint="for example --why tp=4,pp=3,recompute=full")
    return found


def senseless(machine: ClusterSpec) -> dict[str, object]:
    """Values that leave out what makes no sense on a machine: the memory of a CPU is the host's, nothing to offload."""
    return {"offload": "none"} if machine.device.lower() == "cpu" else {}


def summary(estimate: CostEstimate) -> dict[str, Any]:
    """One plan in a ranking."""
    outlook = estimate.outlook
    return {
        "plan": to_json(estimate.plan),
        "plan_text": label(estimate.plan),
        "overrides": overrides(estimate.plan),
        "runnable": estimate.runnable,
        "modelled_reason": estimate.modelled_reason,
        "step_s": estimate.step_s,
        "low_s": estimate.low_s,
        "high_s": estimate.high_s,
        "kinds_s": estimate.step._asdict(),
        "tokens_per_s": estimate.tokens_per_s,
        "surviving_tokens_per_s": estimate.surviving_tokens_per_s,
        "mfu": estimate.mfu,
        "peak_bytes": estimate.peak_bytes,
        "fits": estimate.fits,
        "ranks": estimate.plan.world_size,
        "nodes": outlook.nodes,
        "goodput": outlook.goodput,
        "days_50": outlook.days_50,
        "cost_50_usd": outlook.cost_50,
    }


def label(plan: ParallelPlan) -> str:
    """One line that no other plan has: degrees, and whatever is not plain."""
    parts = [plan.describe()]
    if plan.pp > 1 and plan.schedule != "1f1b":
        parts.append(f"{plan.schedule} x{plan.vpp}" if plan.vpp > 1 else plan.schedule)
    parts += [f"{plan.recompute} recompute"] * (plan.recompute != "none")
    parts += ["sequence parallel"] * plan.sequence_parallel
    parts += [f"{plan.grad_dtype} gradients", f"offload {plan.offload}"][: 1 + (plan.offload != "none")]
    parts += ["no flash"] * (not plan.flash)
    if max(plan.stages) - min(plan.stages) > 1:
        parts.append(f"stages {plan.stages[0]}..{plan.stages[-1]}")
    return ", ".join(parts)


def overrides(plan: ParallelPlan) -> list[str]:
    """The words that give exactly this plan on the command line."""
    values = {name: getattr(plan, name) for name in KNOBS if name != "grad_accum"}
    plain = {"ep": 1, "sp": 1, "cp": 1, "schedule": "1f1b", "vpp": 1, "recompute": "none", "offload": "none"}
    plain |= {"flash": True, "sequence_parallel": False}
    words = ["strategy=default"]
    for name, value in values.items():
        if name in plain and value == plain[name]:
            continue
        if name == "stages":
            value = f"[{','.join(map(str, value))}]"
        words.append(f"strategy.{name}={str(value).lower() if isinstance(value, bool) else value}")
    return words


# ---- inside ---------------------------------------------------------------------------------------------------------


def _configured(config: Config, machine: ClusterSpec | None) -> Workload:
    batch = build.batch_spec(config)
    return _work(config, build.model_spec(config), batch, machine or build.cluster_spec(config))


def _work(config: Config, model: ModelSpec, batch: BatchSpec, machine: ClusterSpec) -> Workload:
    work = build.work_of(config, model, batch, machine)
    if work is None:
        raise ConfigError(
            f"The cluster '{machine.name}' says nothing about its hardware, so there is nothing to search by.",
            hint="phalanx cluster probe measures it; cluster=a100_80 and others come with figures",
        )
    return work


def _fixed(config: Config, machine: ClusterSpec) -> dict[str, object]:
    """What the configuration gives, and what makes no sense on the machine otherwise."""
    return senseless(machine) | config.strategy.asked()


def _searched(config: Config, work: Workload, top: int) -> SearchResult:
    """The result of a search; it has a plan."""
    fixed = _fixed(config, work.cluster)
    space = Space(work, fixed)
    _require_sense(work)
    with _no_collector():
        result = search(work, objective=config.objective, top=top, space=space)
    if not result.ranked:
        raise _nothing(work, fixed, result)
    return result


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """A search makes a million small objects and no garbage cycles: looking for them would take a fifth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _require_sense(work: Workload) -> None:
    """Raise PlanInfeasible for what no plan can mend: the rules of the model, the batch and the machine."""
    plan = resolve_plan(work.model, work.batch, work.cluster, work.precision)
    broken = _violations(work, plan)
    if broken:
        raise PlanInfeasible(broken, what="No plan can be legal:")


def _violations(work: Workload, plan: ParallelPlan) -> tuple[Violation, ...]:
    return rules.check(
        model=work.model,
        plan=plan,
        batch=work.batch,
        cluster=work.cluster,
        precision=work.precision,
        modelled=True,
    )


def _broken(work: Workload, fixed: Mapping[str, Any]) -> tuple[Violation, ...]:
    """What is wrong with fixed values that leave no legal plan."""
    plan = resolve_plan(work.model, work.batch, work.cluster, work.precision, **fixed)
    named = ", ".join(f"{name}={value}" for name, value in fixed.items())
    room = f"{work.cluster.slots} slots with a batch of {work.batch.global_batch}"
    return _violations(work, plan) or (
        Violation(
            rule="no_plan_left",
            message=f"no legal plan has {named} on {room}",
            hint="leave one of them open",
        ),
    )


def _nothing(work: Workload, fixed: Mapping[str, Any], result: SearchResult) -> PlanInfeasible:
    if result.closest is None:
        return PlanInfeasible(_broken(work, fixed), what="No plan is legal:")
    return PlanInfeasible(
        (_too_large(result.closest),), what=f"None of {result.space:,} plans fits the memory of {work.cluster.device}:"
    )


def _too_large(estimate: CostEstimate) -> Violation:
    """Which kind of memory binds, and how far off the plan is."""
    worst = max(estimate.stages, key=sum)
    kind, held = max(worst._asdict().items(), key=lambda item: item[1])
    over = estimate.peak_bytes - estimate.budget_bytes
    share = sum(worst[:3]) / sum(worst)
    more = "more nodes, more tp, pp or ep" if share > 0.5 else "a shorter sequence, more tp, cp, or recompute=full"
    return Violation(
        rule="memory",
        message=f"{label(estimate.plan)} comes closest and needs {storage(estimate.peak_bytes)} on a rank of "
        f"{storage(estimate.budget_bytes)}: {storage(over)} too much; {kind} alone take {storage(held)}",
        hint=f"{more}, or devices with more memory",
    )


def _lost(best: CostEstimate, other: CostEstimate, objective: Objective) -> dict[str, Any]:
    """What one plan loses against another, by kind."""
    seconds = _differences(best.step._asdict(), other.step._asdict(), best.step_s)
    held = [dict(max(one.stages, key=sum)._asdict()) for one in (best, other)]
    memory = _differences(held[0], held[1], best.peak_bytes)
    slower = other.step_s / best.step_s - 1
    return {
        "plan_text": label(other.plan),
        "slower": slower,
        "surviving": other.surviving_tokens_per_s / best.surviving_tokens_per_s - 1,
        "more_bytes": other.peak_bytes - best.peak_bytes,
        "seconds": [{"kind": kind, "more_s": more} for kind, more in seconds],
        "bytes": [{"kind": kind, "more_bytes": more} for kind, more in memory],
        "changes": _changes(best.plan, other.plan),
        "objective": objective,
    }


def _differences(best: Mapping[str, float], other: Mapping[str, float], whole: float) -> list[tuple[str, float]]:
    """Kinds that differ by more than a thousandth of the whole, the largest first."""
    found = [(kind, other[kind] - best[kind]) for kind in best if abs(other[kind] - best[kind]) > 1e-3 * whole]
    return sorted(found, key=lambda item: -abs(item[1]))


def _changes(best: ParallelPlan, other: ParallelPlan) -> list[str]:
    """``tp 8 -> 4``, for each knob that differs."""
    names = [name for name in KNOBS if name != "stages" or best.pp == other.pp]
    return [
        f"{name} {getattr(best, name)} -> {getattr(other, name)}"
        for name in names
        if getattr(best, name) != getattr(other, name)
    ]
