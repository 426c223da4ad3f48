"""Which combinations this DeepSpeed really runs: a table that a probe generates by training, never typed.

``make capabilities`` (:mod:`tests.e2e.probe_capabilities`) trains two steps per combination through the engine and
rewrites :mod:`strategies.capability_table`; a test compares a sample of the two. A degree in the table stands for "1"
or "more than 1".

The full product of all axes would take many hours, so the table has two kinds of rows: of the *state* (degrees,
schedule, ZeRO, precisions, offload) without recomputation, and of the *activations* (degrees, schedule, ZeRO,
recomputation, the split sequence) in fp32. The two meet only in our own layers, so a plan runs if both of its rows do;
that is inferred, and the outcome names the rows. It is tried where there are no other degrees, with tensor parallelism,
and with a pipeline: rows with full recomputation of every state. Nothing else is inferred: what has no row does not run
(so offload with gradients in 16 bit).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import NamedTuple, cast

from strategies.capability_table import TABLE
from strategies.errors import Violation
from strategies.plan import GradDtype, ParallelPlan, Recompute, Schedule
from strategies.specs import ModelSpec, Precision

MODELLED_ONLY = frozenset({"combination_runs", "combination_probed"})
"""Names of the verdicts of :func:`runnable`: what they refuse to run can still be planned with."""

AXES = ("tp", "pp", "ep", "sp", "cp")
_LETTERS = "TPESC"
_SPLIT = "+split"


class Key(NamedTuple):
    """A combination; the degrees (:data:`AXES`) are True above 1.

    There is no ``dp``: the probe has two replicas, or two ranks that share a sequence, which are replicas to DeepSpeed;
    one is the same with groups of one rank. ``offload`` is that of the plan, with ``@nvme`` behind it when there is a
    path to disks.
    """

    tp: bool
    pp: bool
    zero_stage: int
    precision: Precision
    grad_dtype: GradDtype
    recompute: Recompute
    ep: bool = False
    sp: bool = False
    cp: bool = False
    sequence_parallel: bool = False
    schedule: Schedule = "1f1b"
    offload: str = "none"

    @property
    def degrees(self) -> str:
        """The degrees above 1 as letters: ``TPE..``."""
        return "".join(letter if getattr(self, axis) else "." for letter, axis in zip(_LETTERS, AXES, strict=True))

    @property
    def rows(self) -> tuple[Key, ...]:
        """The rows of the table that say whether it runs, if it has no row of its own."""
        state = self._replace(recompute="none", sequence_parallel=False)
        if state == self:
            return (state,)
        return state, self._replace(precision="fp32", grad_dtype="fp32", offload="none")

    @property
    def name(self) -> str:
        """As the table has it: ZeRO stage, precision, gradients, offload, schedule | recompute | degrees."""
        return format_table({self: Outcome(runs=False)}).rpartition("|")[0].strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the probe saw.

    Attributes:
        runs: It trained.
        engine: Class of DeepSpeed's engine.
        optimizer: Class of DeepSpeed's optimizer.
        reason: Why it did not train.
        tried: The probe tried it; False where the machine that it ran on could not, for the reason.
        inferred_from: The rows that this follows from, by name; empty where the combination has a row of its own.
    """

    runs: bool
    engine: str = ""
    optimizer: str = ""
    reason: str = ""
    tried: bool = True
    inferred_from: tuple[str, ...] = ()


def key_of(plan: ParallelPlan, precision: Precision) -> Key:
    """The combination that a plan is of."""
    disks = "@nvme" if plan.offload != "none" and plan.offload_path else ""
    return Key(
        **{axis: getattr(plan, axis) > 1 for axis in AXES},
        zero_stage=plan.zero_stage,
        precision=precision,
        grad_dtype=plan.grad_dtype,
        recompute=plan.recompute,
        sequence_parallel=plan.sequence_parallel and plan.tp > 1,
        schedule=plan.schedule if plan.pp > 1 else "1f1b",
        offload=plan.offload + disks,
    )


def parse_table(text: str) -> dict[Key, Outcome]:
    """Read what :func:`format_table` wrote."""
    table: dict[Key, Outcome] = {}
    for line in text.strip().splitlines():
        kinds, activations, degrees, verdict = (part.strip() for part in line.split("|", maxsplit=3))
        zero, precision, grad, offload, schedule = kinds.split()
        word, _, rest = verdict.partition(" ")
        if word == "runs":
            engine, optimizer = rest.split()
            found = Outcome(runs=True, engine=engine, optimizer=optimizer)
        else:
            found = Outcome(runs=False, reason=rest, tried=word == "refused")
        for activation, letters in product(activations.split(","), degrees.split()):
            key = Key(
                **{axis: letter in letters for letter, axis in zip(_LETTERS, AXES, strict=True)},
                zero_stage=int(zero),
                precision=cast(Precision, precision),
                grad_dtype=cast(GradDtype, grad),
                recompute=cast(Recompute, activation.removesuffix(_SPLIT)),
                sequence_parallel=activation.endswith(_SPLIT),
                schedule=cast(Schedule, schedule),
                offload=offload,
            )
            table[key] = found
    return table


def format_table(table: Mapping[Key, Outcome]) -> str:
    """The table as text: ZeRO stage, precision, gradients, offload, schedule | recompute | degrees | outcome.

    Degrees above 1 are letters: T, P, E, S, C for tp, pp, ep, sp, cp.
    """
    grouped: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for key, found in sorted(table.items(), key=lambda item: item[0]):
        refused = f"{'refused' if found.tried else 'untried'} {found.reason}"
        verdict = f"runs {found.engine} {found.optimizer}" if found.runs else refused
        kinds = f"{key.zero_stage} {key.precision} {key.grad_dtype} {key.offload} {key.schedule}"
        activation = key.recompute + _SPLIT * key.sequence_parallel
        grouped.setdefault((kinds, verdict), {}).setdefault(key.degrees, []).append(activation)
    lines = []
    for (kinds, verdict), activations_of in sorted(grouped.items()):
        merged: dict[str, list[str]] = {}
        for letters, activations in activations_of.items():
            merged.setdefault(",".join(sorted(activations)), []).append(letters)
        lines += [
            f"{kinds} | {activations} | {' '.join(sorted(degrees))} | {verdict}"
            for activations, degrees in sorted(merged.items())
        ]
    return "".join(f"{line}\n" for line in lines)


def outcome(plan: ParallelPlan, precision: Precision) -> Outcome | None:
    """What the probe saw for such a plan, or what follows from it; None if there is nothing to say."""
    return _seen(key_of(plan, precision))


@cache
def _seen(key: Key) -> Outcome | None:
    return look_up(_probed(), key)


def look_up(table: Mapping[Key, Outcome], key: Key) -> Outcome | None:
    """What a table says of a combination: its own row, else what both of :attr:`Key.rows` say together."""
    if key in table:
        return table[key]
    found = [(row.name, table.get(row)) for row in key.rows]
    for name, one in found:
        if one is None:
            return None
        if not one.runs:
            return replace(one, inferred_from=(name,))
    _, state = found[0]
    return state and replace(state, inferred_from=tuple(name for name, _ in found))


@cache
def schedules() -> frozenset[Schedule]:
    """Pipeline schedules that the probe has seen run."""
    return frozenset(key.schedule for key, found in _probed().items() if found.runs)


@cache
def _probed() -> Mapping[Key, Outcome]:
    return MappingProxyType(parse_table(TABLE))


def runnable(plan: ParallelPlan, precision: Precision, model: ModelSpec) -> Violation | None:
    """Why a legal plan cannot run yet (it can only be modelled), or None.

    Args:
        plan: The plan.
        precision: Arithmetic of forward and backward.
        model: The model; both flavours run the same combinations.
    """
    modelled = unbuilt(plan, precision, model) or _refused(plan, model)
    if modelled is not None:
        return Violation(rule="combination_runs", message=modelled[0], hint=modelled[1])
    seen = outcome(plan, precision)
    if seen is not None and seen.runs:
        return None
    if seen is None:
        reason = "it has never been tried"
    else:
        reason = f"{'' if seen.tried else 'it has not been tried: '}{seen.reason}"
        reason += f" (as in '{seen.inferred_from[0]}')" if seen.inferred_from else ""
    return Violation(
        rule="combination_probed",
        message=f"{plan.describe()} in {precision}, gradients in {plan.grad_dtype}, does not run: {reason}",
        hint="strategy.zero_stage=1 with strategy.grad_dtype=fp32 runs with every tp, pp and dp",
    )


def unbuilt(plan: ParallelPlan, precision: Precision, model: ModelSpec) -> tuple[str, str] | None:
    """What phalanx itself does not build, message and hint; the probe has nothing to try then."""
    return _not_built(model) or _modelled_only(plan, precision) or _not_with_experts(plan, model)


def _not_built(model: ModelSpec) -> tuple[str, str] | None:
    """What our own model code does not have: message and hint. It would silently build another model."""
    parts = {
        "latent attention": model.latent is not None,
        "a norm after the embedding": model.embed_norm,
        "a feed-forward block of the other flavour": model.has_gate != (model.flavour == "llama"),
        "positions of the other flavour": bool(model.learned_positions) != (model.flavour == "gpt3"),
    }
    found = [part for part, there in parts.items() if there]
    if not found:
        return None
    return f"the model '{model.name}' has {', '.join(found)}: modelled only", "model=gpt_tiny and model=llama_tiny run"


def _modelled_only(plan: ParallelPlan, precision: Precision) -> tuple[str, str] | None:
    """What the engine does not build: message and hint."""
    if plan.schedule not in ("1f1b", "dualpipev") and plan.pp > 1:
        return f"schedule {plan.schedule} is modelled only", "strategy.schedule=1f1b, or strategy.schedule=dualpipev"
    if plan.cp > 1:
        return f"cp {plan.cp}: context parallelism is modelled only", "strategy.cp=1; strategy.sp cuts sequences, too"
    if precision == "fp8":
        return "fp8 is modelled only", "train.precision=bf16"
    return None


def _not_with_experts(plan: ParallelPlan, model: ModelSpec) -> tuple[str, str] | None:
    """What runs, but not with experts: message and hint."""
    if model.moe is None:
        return None
    if plan.ep > 1 and plan.zero_stage == 0 and plan.grad_dtype != "fp32" and plan.pp == 1:
        message = f"zero_stage 0 with ep {plan.ep} and gradients in {plan.grad_dtype} is modelled only: "
        # DeepSpeed trains it, with another gradient norm than any other plan; phalanx has replaced the others.
        return f"{message}the norm of FP16_UnfusedOptimizer leaves experts out", "strategy.zero_stage=1"
    return None


def _refused(plan: ParallelPlan, model: ModelSpec) -> tuple[str, str] | None:
    """What DeepSpeed refuses, in our words: message and hint. The probe asks it all the same, and a test compares."""
    if model.moe is None or plan.ep == 1 or plan.zero_stage != 3:
        return None
    message = f"zero_stage 3 with ep {plan.ep} is modelled only: DeepSpeed takes no such experts under ZeRO-3"
    return message, "strategy.zero_stage=2, or strategy.ep=1"
