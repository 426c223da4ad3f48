"""Which combinations this DeepSpeed really runs: a table that a probe generates by training, never typed.

``python -m tests.e2e.probe_capabilities --write`` trains two steps per combination through the engine and rewrites
:data:`TABLE`; a test compares the two. A degree in the table stands for "1" or "more than 1".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import MappingProxyType
from typing import NamedTuple, cast

from strategies.errors import Violation
from strategies.plan import GradDtype, ParallelPlan, Recompute
from strategies.specs import ModelSpec, Precision

MODELLED_ONLY = frozenset({"combination_runs", "combination_probed"})
"""Names of the verdicts of :func:`runnable`: what they refuse to run can still be planned with."""


class Key(NamedTuple):
    """A combination; ``tp``, ``pp`` and ``dp`` are True for degrees above 1."""

    tp: bool
    pp: bool
    dp: bool
    zero_stage: int
    precision: Precision
    grad_dtype: GradDtype
    recompute: Recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What the probe saw.

    Attributes:
        runs: It trained.
        engine: Class of DeepSpeed's engine.
        optimizer: Class of DeepSpeed's optimizer.
        reason: Why it did not train.
    """

    runs: bool
    engine: str = ""
    optimizer: str = ""
    reason: str = ""


def key_of(plan: ParallelPlan, precision: Precision) -> Key:
    """The row of the table that a plan belongs to."""
    return Key(
        tp=plan.tp > 1,
        pp=plan.pp > 1,
        dp=plan.dp > 1,
        zero_stage=plan.zero_stage,
        precision=precision,
        grad_dtype=plan.grad_dtype,
        recompute=plan.recompute,
    )


def parse_table(text: str) -> dict[Key, Outcome]:
    """Read what :func:`format_table` wrote."""
    table: dict[Key, Outcome] = {}
    for line in text.strip().splitlines():
        kinds, recomputes, degrees, verdict = (part.strip() for part in line.split("|", maxsplit=3))
        zero, precision, grad = kinds.split()
        word, _, rest = verdict.partition(" ")
        if word == "runs":
            engine, optimizer = rest.split()
            found = Outcome(runs=True, engine=engine, optimizer=optimizer)
        else:
            found = Outcome(runs=False, reason=rest)
        for recompute, letters in product(recomputes.split(","), degrees.split()):
            key = Key(
                tp="T" in letters,
                pp="P" in letters,
                dp="D" in letters,
                zero_stage=int(zero),
                precision=cast(Precision, precision),
                grad_dtype=cast(GradDtype, grad),
                recompute=cast(Recompute, recompute),
            )
            table[key] = found
    return table


def format_table(table: Mapping[Key, Outcome]) -> str:
    """The table as text: ZeRO stage, precision, gradients | recompute | degrees above 1 (T, P, D) | outcome."""
    grouped: dict[tuple[int, str, str, str], dict[str, list[str]]] = {}
    for key, found in sorted(table.items(), key=lambda item: item[0]):
        letters = "".join(letter if on else "." for letter, on in zip("TPD", key[:3], strict=True))
        verdict = f"runs {found.engine} {found.optimizer}" if found.runs else f"refused {found.reason}"
        group = grouped.setdefault((key.zero_stage, key.precision, key.grad_dtype, verdict), {})
        group.setdefault(letters, []).append(key.recompute)
    lines = []
    for (zero, precision, grad, verdict), recomputes_of in sorted(grouped.items()):
        merged: dict[str, list[str]] = {}
        for letters, recomputes in recomputes_of.items():
            merged.setdefault(",".join(sorted(recomputes)), []).append(letters)
        lines += [
            f"{zero} {precision} {grad} | {recomputes} | {' '.join(degrees)} | {verdict}"
            for recomputes, degrees in sorted(merged.items())
        ]
    return "".join(f"{line}\n" for line in lines)


def outcome(plan: ParallelPlan, precision: Precision) -> Outcome | None:
    """What the probe saw for such a plan; None if the combination was not probed."""
    return _probed().get(key_of(plan, precision))


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
    modelled = _not_built(model) or _modelled_only(plan, precision) or _not_with_experts(plan, model)
    if modelled is not None:
        return Violation(rule="combination_runs", message=modelled[0], hint=modelled[1])
    seen = outcome(plan, precision)
    if seen is not None and seen.runs:
        return None
    reason = seen.reason if seen is not None else "it has never been tried"
    return Violation(
        rule="combination_probed",
        message=f"{plan.describe()} in {precision}, gradients in {plan.grad_dtype}, does not run: {reason}",
        hint="strategy.zero_stage=1 with strategy.grad_dtype=fp32 runs with every tp, pp and dp",
    )


def _not_built(model: ModelSpec) -> tuple[str, str] | None:
    """What our own model code does not have: message and hint. It would silently build another model."""
    parts = {
        "latent attention": model.latent is not None,
        "a norm after the embedding": model.embed_norm,
        "a feed-forward block of the other flavour": model.has_gate != (model.flavour == "llama"),
        "heads of a width of their own": model.head_width * model.heads not in (0, model.hidden),
        "positions of another flavour or number": model.position_rows
        not in (None, model.seq * (model.flavour == "gpt3")),
    }
    found = [part for part, there in parts.items() if there]
    if not found:
        return None
    return f"the model '{model.name}' has {', '.join(found)}: modelled only", "model=gpt_tiny and model=llama_tiny run"


def _modelled_only(plan: ParallelPlan, precision: Precision) -> tuple[str, str] | None:
    """What the engine does not build: message and hint."""
    if plan.schedule != "1f1b" and plan.pp > 1:
        return f"schedule {plan.schedule} is modelled only", "strategy.schedule=1f1b"
    if plan.sp > 1 or plan.cp > 1:
        return f"sp {plan.sp}, cp {plan.cp}: sequence parallelism is modelled only", "strategy.sp=1 strategy.cp=1"
    if plan.offload != "none":
        return f"offload {plan.offload} is modelled only", "strategy.offload=none"
    if precision == "fp8":
        return "fp8 is modelled only", "train.precision=bf16"
    if plan.sequence_parallel and plan.tp > 1:
        return "sequence_parallel is modelled only", "strategy.sequence_parallel=false"
    if precision == "fp16":
        return "fp16 is modelled only: no probe has run on a device that has it", "train.precision=bf16"
    return None


def _not_with_experts(plan: ParallelPlan, model: ModelSpec) -> tuple[str, str] | None:
    """What runs, but not with experts: message and hint."""
    if model.moe is None:
        return None
    if plan.sp * plan.cp > 1 or (plan.sequence_parallel and plan.tp > 1):
        hint = "strategy.sp=1 strategy.cp=1 strategy.sequence_parallel=false"
        return "experts with a sequence that is split over ranks are modelled only", hint
    if plan.ep > 1 and plan.zero_stage == 3:
        message = f"zero_stage 3 with ep {plan.ep} is modelled only: DeepSpeed's ZeRO-3 cuts over all replicas"
        return message, "strategy.zero_stage=2, or strategy.ep=1"
    if plan.ep > 1 and plan.zero_stage == 0 and plan.grad_dtype != "fp32" and plan.pp == 1:
        message = f"zero_stage 0 with ep {plan.ep} and gradients in {plan.grad_dtype} is modelled only"
        return message, "strategy.zero_stage=1"
    return None


# generated by tests.e2e.probe_capabilities: begin
TABLE = """
0 bf16 bf16 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine FP16_UnfusedOptimizer
0 bf16 bf16 | full,none,selective | .P. .PD TP. TPD | runs PipelineEngine BF16_Optimizer
0 bf16 fp32 | full,none,selective | ... ..D .P. .PD T.. T.D TP. TPD | refused unsupported mix of model_dtype=torch.bfloat16 and grad_accum_dtype=torch.float32
0 fp32 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine AdamW
0 fp32 fp32 | full,none,selective | .P. .PD TP. TPD | runs PipelineEngine AdamW
1 bf16 bf16 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 bf16 bf16 | full,none,selective | .P. .PD TP. TPD | runs PipelineEngine DeepSpeedZeroOptimizer
1 bf16 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine BF16_Optimizer
1 bf16 fp32 | full,none,selective | .P. .PD TP. TPD | runs PipelineEngine BF16_Optimizer
1 fp32 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer
1 fp32 fp32 | full,none,selective | .P. .PD TP. TPD | runs PipelineEngine DeepSpeedZeroOptimizer
2 bf16 bf16 | full,none,selective | .P. .PD TP. TPD | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 bf16 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 bf16 fp32 | full,none,selective | .P. .PD TP. TPD | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 bf16 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer
2 fp32 fp32 | full,none,selective | .P. .PD TP. TPD | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
2 fp32 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer
3 bf16 bf16 | full,none,selective | .P. .PD TP. TPD | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 bf16 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 bf16 fp32 | full,none,selective | .P. .PD TP. TPD | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 bf16 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
3 fp32 fp32 | full,none,selective | .P. .PD TP. TPD | refused ZeRO-2 and ZeRO-3 are incompatible with pipeline parallelism
3 fp32 fp32 | full,none,selective | ... ..D T.. T.D | runs DeepSpeedEngine DeepSpeedZeroOptimizer_Stage3
"""  # noqa: E501
# generated by tests.e2e.probe_capabilities: end
