"""The plan of a script: it brings its own parallelism, so that a plan only says how many ranks there are. Pure."""

from __future__ import annotations

import math

from launcher.schema import Config
from strategies import rules
from strategies.errors import Violation
from strategies.plan import ParallelPlan
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec

# A model that breaks no rule: a script's model is its own business.
_BLANK = ModelSpec(name="script", layers=1, hidden=1, heads=1, kv_heads=1, ffn=1, vocab=2, seq=1)


def script_plan(config: Config, machine: ClusterSpec) -> tuple[ParallelPlan, tuple[Violation, ...]]:
    """As many replicas as ranks are asked for, or as there are slots; and the rules that they break."""
    ask = config.strategy
    others = math.prod(degree or 1 for degree in (ask.tp, ask.pp, ask.sp, ask.cp))
    dp = others * (ask.dp or max(1, machine.slots // others))
    plan = ParallelPlan(dp=dp, stages=(1,), micro_batch=1, grad_accum=1)
    rows = BatchSpec(global_batch=dp, seq=1)
    return plan, rules.check(model=_BLANK, plan=plan, batch=rows, cluster=machine, precision="fp32", modelled=True)
