"""The step of a mixture of experts at EP4 against the dense model of equal active parameters, on the same ranks.

Four ranks, ZeRO-1, the same batch. Runs alternate. Asserted: tokens crossed ranks, and both models are what they
shall be.

``python -m pytest tests/benchmarks/test_experts.py -m full -s``; PHALANX_BENCH_QUICK=1 for one pair.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from strategies.codec import to_json
from strategies.specs import ModelSpec, MoeSpec
from tests.benchmarks.stats import Musts, repeats, show
from tests.support.gang import WarmPool
from tests.support.jobspecs import LLAMA, make_job, make_plan

DENSE = dataclasses.replace(LLAMA, layers=4, hidden=256, heads=8, kv_heads=8, ffn=1024, vocab=512, seq=128)
SPARSE = dataclasses.replace(DENSE, moe=MoeSpec(experts=8, top_k=2, ffn=512, balance_weight=0.01, z_weight=0.001))
BATCH, STEPS = 32, 8


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ep", [4, 2])
def test_a_step_with_experts(ep: int, musts: Musts) -> None:
    contenders: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
        f"experts, EP{ep}": (SPARSE, {"ep": ep}),
        "dense": (DENSE, {}),
    }
    assert SPARSE.active_parameters == pytest.approx(DENSE.parameters, rel=0.01)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with WarmPool() as pool:
        for _ in range(repeats(5)):
            for name, (model, degrees) in contenders.items():
                plan = make_plan(model, BATCH, dp=4, zero_stage=1, micro_batch=8, **degrees)
                job = make_job(model, plan, global_batch=BATCH)
                arguments = {"job": to_json(job), "steps": STEPS}
                ranks = pool.run(
                    "tests.support.expert_ranks:step_seconds", world_size=4, arguments=arguments, timeout_s=120
                )
                seconds[name].append(max(rank["seconds"] for rank in ranks))
                assert (ranks[0]["crossed"] > BATCH * model.seq) == ("ep" in degrees)
    show(f"a step of 4 ranks, {SPARSE.active_parameters / 1e6:.1f} M parameters per token", seconds)
    names = list(contenders)
    musts.ratio(seconds[names[0]], seconds[names[1]], what="experts / dense", must=1.3)
