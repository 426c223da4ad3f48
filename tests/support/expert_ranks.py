"""What ranks do in the benchmark of experts: steps, timed."""

from __future__ import annotations

import statistics
import time
from typing import Any

from jobs.engine import Engine
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches

WARM_UP = 2


def step_seconds(env: RankEnv, job: dict[str, Any], steps: int) -> dict[str, float]:
    """Median seconds of a step after a warm-up, and of what the rank itself did in it; visits that crossed ranks."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    whole, own, crossed = [], [], 0
    for step in range(1, WARM_UP + steps + 1):
        given = batches(spec, step, engine.grid)
        engine.own_time.begin()
        begin = time.perf_counter()
        result = engine.train_step(step, given)
        whole.append(time.perf_counter() - begin)
        own.append(engine.own_time.end()[0])
        crossed = 0 if result.moe is None else result.moe.crossed
    engine.close()
    return {
        "seconds": statistics.median(whole[WARM_UP:]),
        "own_s": statistics.median(own[WARM_UP:]),
        "crossed": crossed,
    }
