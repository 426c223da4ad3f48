"""Rules about cutting sequences, spreading experts and interleaving virtual stages."""

from __future__ import annotations

import math

from strategies.cases import Case, Rule, divisors
from strategies.errors import Violation
from strategies.remedy import hint_of, legal, nearest_legal, offered

# --- the sequence ----------------------------------------------------------------------------------------------------


def heads_divisible_by_sp(case: Case) -> Violation | None:
    """Ulysses trades sequence shards for heads, so it needs as many of them on every tensor-parallel shard."""
    heads, tp, sp = case.model.heads, case.plan.tp, case.plan.sp
    if min(heads, tp, sp) < 1 or sp == 1 or heads % tp or (heads // tp) % sp == 0:
        return None
    return Violation(
        rule="heads_divisible_by_sp",
        message=f"heads {heads} / tp {tp} = {heads // tp} is not divisible by sp {sp}",
        hint=nearest_legal(case, "heads_divisible_by_sp", "sp", sp, divisors(heads // tp)),
    )


def sequence_divisible(case: Case) -> Violation | None:
    """Ulysses cuts the sequence into sp parts, causal ring attention into 2 x cp: a front and a back one per rank."""
    seq, sp, cp = case.batch.seq, case.plan.sp, case.plan.cp
    if min(seq, sp, cp) < 1:
        return None
    parts = sp * (2 * cp if cp > 1 else 1)
    if seq % parts == 0:
        return None
    whole = [part for part in divisors(seq) if part % sp == 0 and (part // sp) % 2 == 0 and part > 2 * sp]
    rings, rule = [value // (2 * sp) for value in whole], "sequence_divisible"
    if seq % sp == 0:
        rings.append(1)
    knob, choices = ("cp", rings) if cp > 1 else ("sp", divisors(seq))
    return Violation(
        rule=rule,
        message=f"sequences of {seq} tokens are not divisible by sp {sp}"
        + (f" x 2 x cp {cp} = {parts}" if cp > 1 else ""),
        hint=nearest_legal(case, rule, knob, cp if cp > 1 else sp, choices),
    )


def sequence_parallel_fits(case: Case) -> Violation | None:
    """Megatron's sequence parallelism spreads what a rank holds of a sequence over its tensor-parallel ranks."""
    plan, seq = case.plan, case.batch.seq
    if not plan.sequence_parallel or min(plan.tp, plan.sp, plan.cp, seq) < 1:
        return None
    rule, plain = "sequence_parallel_fits", ("strategy.sequence_parallel=false", {"sequence_parallel": False})
    held = seq // (plan.sp * plan.cp)
    shards = divisors(held)[1:] if plan.tp == 1 else divisors(held)
    if plan.tp == 1:
        message = "sequence_parallel with tp 1: there is no tensor-parallel rank to share with"
    elif held < 1 or held % plan.tp == 0:
        return None
    else:
        message = f"sequence_parallel: {held} tokens of a sequence per rank are not divisible by tp {plan.tp}"
    options = offered(case, rule, plain)
    if legal(case, rule, "tp", shards):
        options.append(nearest_legal(case, rule, "tp", plan.tp, shards))
    return Violation(rule=rule, message=message, hint=hint_of(options, "; or "))


# --- experts ---------------------------------------------------------------------------------------------------------


def experts_need_moe(case: Case) -> Violation | None:
    """Expert parallelism spreads experts, and dense models have none."""
    if case.plan.ep <= 1 or case.model.moe is not None:
        return None
    return Violation(
        rule="experts_need_moe",
        message=f"ep {case.plan.ep}, but the model '{case.model.name}' has no experts",
        hint="strategy.ep=1",
    )


def experts_divisible_by_ep(case: Case) -> Violation | None:
    """Expert parallelism gives every rank of a group the same number of experts."""
    moe, ep = case.model.moe, case.plan.ep
    if moe is None or min(moe.experts, ep) < 1 or moe.experts % ep == 0:
        return None
    return Violation(
        rule="experts_divisible_by_ep",
        message=f"experts {moe.experts} is not divisible by ep {ep} (rest {moe.experts % ep})",
        hint=nearest_legal(case, "experts_divisible_by_ep", "ep", ep, divisors(moe.experts)),
    )


def ep_divides_replicas(case: Case) -> Violation | None:
    """Groups of expert parallelism are made of ranks that compute on different tokens with the same other weights.

    Other code may also leave experts whole and spread them over the tensor-parallel ranks (expert-tensor-parallel 1).
    """
    plan, moe = case.plan, case.model.moe
    room = plan.dp * plan.sp * plan.cp * (1 if case.engine else plan.tp)
    if moe is None or min(plan.dp, plan.sp, plan.cp, plan.tp, plan.ep) < 1 or room % plan.ep == 0:
        return None
    product = " x ".join(f"{name} {getattr(plan, name)}" for name in ("dp", "sp", "cp") if getattr(plan, name) > 1)
    return Violation(
        rule="ep_divides_replicas",
        message=f"ep {plan.ep} does not divide {product or 'dp 1'}" + (f" = {room}" if " x " in product else ""),
        hint=nearest_legal(case, "ep_divides_replicas", "ep", plan.ep, divisors(math.gcd(room, moe.experts))),
    )


# --- virtual stages --------------------------------------------------------------------------------------------------


def virtual_stages_divide_blocks(case: Case) -> Violation | None:
    """Every stage is cut into vpp equal parts; embedding and head may count as a block of the first and last stage.

    So does Megatron-Core (``--account-for-embedding-in-pipeline-split``). Other code may cut unevenly.
    """
    plan = case.plan
    if plan.vpp <= 1 or plan.pp < 1 or not plan.stages or min(plan.stages) < 1 or plan.schedule != "interleaved":
        return None
    ends = {0, len(plan.stages) - 1}
    whole = [
        blocks % plan.vpp == 0 or (index in ends and (blocks + 1) % plan.vpp == 0)
        for index, blocks in enumerate(plan.stages)
    ]
    if all(whole) or (not case.engine and min(plan.stages) >= plan.vpp):
        return None
    stage, rule = whole.index(False), "virtual_stages_divide_blocks"
    parts = sorted({*divisors(max(plan.stages)), *divisors(plan.stages[stage]), *divisors(max(plan.stages) + 1)})
    return Violation(
        rule=rule,
        message=f"stage {stage} has {plan.stages[stage]} blocks, not divisible into vpp {plan.vpp} virtual stages",
        hint=nearest_legal(case, rule, "vpp", plan.vpp, parts),
    )


def interleaving_in_rounds(case: Case) -> Violation | None:
    """Interleaved 1F1B sends micro-batches through its virtual stages in rounds of pp (arXiv 2104.04473)."""
    plan = case.plan
    if plan.schedule != "interleaved" or min(plan.vpp, plan.pp) <= 1 or min(plan.grad_accum, plan.dp) < 1:
        return None
    if plan.grad_accum % plan.pp == 0:
        return None
    rounds = plan.grad_accum // plan.pp
    sizes = [count * plan.pp * plan.micro_batch * plan.dp for count in (rounds, rounds + 1) if count]
    rule, knob, size = "interleaving_in_rounds", "batch.global_batch", case.batch.global_batch
    options = [nearest_legal(case, rule, knob, size, sizes, "train.global_batch")] * bool(
        legal(case, rule, knob, sizes)
    )
    plain = ("strategy.schedule=1f1b strategy.vpp=1", {"schedule": "1f1b", "vpp": 1})
    return Violation(
        rule=rule,
        message=f"grad_accum {plan.grad_accum} is not divisible by pp {plan.pp}, as the interleaved schedule needs",
        hint=hint_of([*options, *offered(case, rule, plain)], "; or "),
    )


SPLIT_RULES: tuple[Rule, ...] = (
    heads_divisible_by_sp,
    sequence_divisible,
    sequence_parallel_fits,
    experts_need_moe,
    experts_divisible_by_ep,
    ep_divides_replicas,
    virtual_stages_divide_blocks,
    interleaving_in_rounds,
)
"""In the order in which they are reported."""
