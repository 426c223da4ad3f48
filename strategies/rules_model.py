"""Rules about the model alone, and about cutting it into tensor-parallel shards and pipeline stages."""

from __future__ import annotations

import math

from strategies.cases import Case, Rule, divisors, either, legal_tp
from strategies.errors import Violation
from strategies.plan import split_layers
from strategies.remedy import REACH, hint_of, legal, nearest_legal

# --- the model -------------------------------------------------------------------------------------------------------


def model_sizes_positive(case: Case) -> Violation | None:
    """Every size of the model is at least 1, the vocabulary at least 2."""
    model = case.model
    sizes = {name: getattr(model, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "seq")}
    if model.moe is not None:
        sizes |= {f"moe.{name}": getattr(model.moe, name) for name in ("experts", "top_k", "ffn")}
    if model.latent is not None:
        names = ("kv_rank", "nope_width", "rope_width", "value_width")
        sizes |= {f"latent.{name}": getattr(model.latent, name) for name in names}
    wrong = [f"{name} {size}" for name, size in sizes.items() if size < 1]
    if case.model.vocab < 2:
        wrong.append(f"vocab {case.model.vocab}")
    if not wrong:
        return None
    return Violation(
        rule="model_sizes_positive",
        message=f"the model has {', '.join(wrong)}",
        hint="sizes are at least 1, the vocabulary at least 2",
    )


def hidden_divisible_by_heads(case: Case) -> Violation | None:
    """The heads share the hidden width evenly."""
    hidden, heads = case.model.hidden, case.model.heads
    if min(hidden, heads) < 1 or hidden % heads == 0 or case.model.head_width or case.model.latent:
        return None
    rule, options = "hidden_divisible_by_heads", []
    for knob, value, choices in (("heads", heads, divisors(hidden)), ("hidden", hidden, _multiples(hidden, heads))):
        if legal(case, rule, f"model.{knob}", choices):
            found = nearest_legal(case, rule, f"model.{knob}", value, choices, knob)
            options.append(found + _alike(case) * (knob == "heads"))
    return Violation(
        rule=rule,
        message=f"hidden {hidden} is not divisible by heads {heads} (rest {hidden % heads})",
        hint=hint_of(options, "; "),
    )


def _alike(case: Case) -> str:
    """Key/value heads that are as many as heads are taken to stay so (:func:`strategies.remedy.changed`)."""
    return " (kv_heads alike)" if case.model.kv_heads == case.model.heads else ""


def _multiples(value: int, of: int) -> tuple[int, ...]:
    low = value // of * of
    return (low, low + of) if low else (of,)


def heads_divisible_by_kv_heads(case: Case) -> Violation | None:
    """Each key/value head serves the same number of query heads."""
    heads, kv_heads = case.model.heads, case.model.kv_heads
    if min(heads, kv_heads) < 1 or heads % kv_heads == 0:
        return None
    return Violation(
        rule="heads_divisible_by_kv_heads",
        message=f"heads {heads} is not divisible by kv_heads {kv_heads} (rest {heads % kv_heads})",
        hint=nearest_legal(
            case, "heads_divisible_by_kv_heads", "model.kv_heads", kv_heads, divisors(heads), "kv_heads"
        ),
    )


def rotary_head_width_even(case: Case) -> Violation | None:
    """Rotary positions turn pairs of numbers."""
    model = case.model
    if model.flavour != "llama" or min(model.hidden, model.heads) < 1 or model.latent:
        return None
    if model.head_dim % 2 == 0 or (not model.head_width and model.hidden % model.heads):
        return None
    rule = "rotary_head_width_even"
    if model.head_width:
        message = f"head_width {model.head_width} is odd, rotary positions need pairs"
        near = [width for width in (model.head_width - 1, model.head_width + 1) if width > 0]
        hint = nearest_legal(case, rule, "model.head_width", model.head_width, near, "head_width")
        return Violation(rule=rule, message=message, hint=hint)
    even = [heads for heads in divisors(model.hidden) if model.hidden // heads % 2 == 0]
    return Violation(
        rule=rule,
        message=f"hidden {model.hidden} / heads {model.heads} = {model.head_dim} is odd, rotary positions need pairs",
        hint=nearest_legal(case, rule, "model.heads", model.heads, even, "heads") + _alike(case)
        if even
        else "choose an even hidden",
    )


def experts_consistent(case: Case) -> Violation | None:
    """A token visits different experts, and the dense blocks are blocks of the model."""
    moe, layers = case.model.moe, case.model.layers
    if moe is None or min(moe.experts, moe.top_k, layers) < 1:
        return None
    wrong, hints = [], []
    if moe.top_k > moe.experts:
        wrong.append(f"top_k {moe.top_k} of {moe.experts} experts")
        hints.append(f"nearest legal model.moe.top_k: {moe.experts}")
    if not 0 <= moe.dense_layers < layers:
        wrong.append(f"dense_layers {moe.dense_layers} of {layers} layers")
        hints.append(f"nearest legal model.moe.dense_layers: {0 if moe.dense_layers < 0 else layers - 1}")
    if moe.shared_ffn < 0:
        wrong.append(f"shared_ffn {moe.shared_ffn}")
        hints.append("nearest legal model.moe.shared_ffn: 0")
    if moe.imbalance < 1:
        wrong.append(f"imbalance {moe.imbalance:g}")
        hints.append("nearest legal model.moe.imbalance: 1")
    for name in ("capacity_factor", "balance_weight", "z_weight"):
        if not 0 <= getattr(moe, name) < math.inf:
            wrong.append(f"{name} {getattr(moe, name):g}")
            hints.append(f"nearest legal model.moe.{name}: 0")
    if not wrong:
        return None
    return Violation(rule="experts_consistent", message=f"the model has {', '.join(wrong)}", hint="; ".join(hints))


# --- degrees ---------------------------------------------------------------------------------------------------------

_DEGREES = ("tp", "pp", "dp", "ep", "sp", "cp", "vpp", "micro_batch", "grad_accum")


def degrees_positive(case: Case) -> Violation | None:
    """Every degree and count is at least 1."""
    wrong = [f"{name} {getattr(case.plan, name)}" for name in _DEGREES if getattr(case.plan, name) < 1]
    if not wrong:
        return None
    return Violation(rule="degrees_positive", message=f"the plan has {', '.join(wrong)}", hint="use 1 or more")


def _divisible_by_tp(case: Case, name: str) -> Violation | None:
    size, tp = getattr(case.model, name), case.plan.tp
    if min(size, tp) < 1 or size % tp == 0:
        return None
    return Violation(
        rule=f"{name}_divisible_by_tp",
        message=f"{name} {size} is not divisible by tp {tp} (rest {size % tp})",
        hint=nearest_legal(case, f"{name}_divisible_by_tp", "tp", tp, legal_tp(case.model)),
    )


def heads_divisible_by_tp(case: Case) -> Violation | None:
    """Tensor parallelism gives every shard the same number of query heads."""
    return _divisible_by_tp(case, "heads")


def kv_heads_divisible_by_tp(case: Case) -> Violation | None:
    """Tensor parallelism gives every shard the same number of key/value heads; other code copies them to more."""
    if not case.engine and case.model.kv_heads >= 1 and case.plan.tp % case.model.kv_heads == 0:
        return None
    return _divisible_by_tp(case, "kv_heads")


def ffn_divisible_by_tp(case: Case) -> Violation | None:
    """Tensor parallelism cuts the feed-forward block evenly."""
    return _divisible_by_tp(case, "ffn")


def hidden_divisible_by_tp(case: Case) -> Violation | None:
    """Tensor parallelism cuts the attention projections evenly."""
    return _divisible_by_tp(case, "hidden")


def experts_divisible_by_tp(case: Case) -> Violation | None:
    """Tensor parallelism cuts every expert evenly; other code may leave experts whole."""
    moe, tp = case.model.moe, case.plan.tp
    if moe is None or tp < 1 or not case.engine or (moe.ffn % tp == 0 and moe.shared_ffn % tp == 0):
        return None
    widths = f"{moe.ffn}" + (f" and {moe.shared_ffn}" if moe.shared_ffn else "")
    return Violation(
        rule="experts_divisible_by_tp",
        message=f"experts of inner width {widths} are not divisible by tp {tp}",
        hint=nearest_legal(case, "experts_divisible_by_tp", "tp", tp, legal_tp(case.model)),
    )


def pp_at_most_layers(case: Case) -> Violation | None:
    """Every pipeline stage needs a block."""
    pp, layers = case.plan.pp, case.model.layers
    if layers < 1 or pp <= layers:
        return None
    return Violation(
        rule="pp_at_most_layers",
        message=f"pp {pp} is larger than layers {layers}: {pp - layers} stages would be empty",
        hint=nearest_legal(case, "pp_at_most_layers", "pp", pp, [1, *range(max(2, layers - REACH), layers + 1)]),
    )


def stages_match_pp(case: Case) -> Violation | None:
    """There is one entry of ``stages`` per pipeline stage."""
    pp, stages = case.plan.pp, case.plan.stages
    if pp < 1 or len(stages) == pp:
        return None
    return Violation(
        rule="stages_match_pp",
        message=f"stages {list(stages)} has {len(stages)} entries for pp {pp}",
        hint=_even_stages(case),
    )


def stages_sum_to_layers(case: Case) -> Violation | None:
    """The stages hold all blocks."""
    total = sum(case.plan.stages)
    if case.model.layers < 1 or total == case.model.layers:
        return None
    return Violation(
        rule="stages_sum_to_layers",
        message=f"stages {list(case.plan.stages)} sum to {total}, the model has {case.model.layers} layers",
        hint=_even_stages(case),
    )


def stages_not_empty(case: Case) -> Violation | None:
    """Every stage holds at least one block."""
    if case.plan.pp > case.model.layers or all(count >= 1 for count in case.plan.stages):
        return None
    empty = [index for index, count in enumerate(case.plan.stages) if count < 1]
    return Violation(
        rule="stages_not_empty",
        message=f"stages {list(case.plan.stages)} leaves stage {either(empty)} without a block",
        hint=_even_stages(case),
    )


def _even_stages(case: Case) -> str:
    pp = max(1, min(case.plan.pp, case.model.layers))
    return f"an even split is strategy.stages={list(split_layers(max(1, case.model.layers), pp))}".replace(" [", "[")


MODEL_RULES: tuple[Rule, ...] = (
    model_sizes_positive,
    hidden_divisible_by_heads,
    heads_divisible_by_kv_heads,
    rotary_head_width_even,
    experts_consistent,
    degrees_positive,
    heads_divisible_by_tp,
    kv_heads_divisible_by_tp,
    ffn_divisible_by_tp,
    hidden_divisible_by_tp,
    experts_divisible_by_tp,
    pp_at_most_layers,
    stages_match_pp,
    stages_sum_to_layers,
    stages_not_empty,
)
"""In the order in which they are reported."""
