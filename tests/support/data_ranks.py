"""What ranks of data tests run."""

from __future__ import annotations

from typing import Any

from jobs.engine import Engine
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json
from tests.support.ranks import batches, dump


def train(env: RankEnv, job: dict[str, Any], steps: int, evaluate_every: int = 0) -> dict[str, Any]:
    """Train, and evaluate on the samples of later steps; losses, norms and evaluations in hexadecimal, weights."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    losses, norms, evaluations = [], [], []
    for step in range(1, steps + 1):
        result = engine.train_step(step, batches(spec, step, engine.grid))
        losses.append(result.loss.hex())
        norms.append(result.grad_norm.hex())
        if evaluate_every and step % evaluate_every == 0:
            evaluations += [engine.evaluate(batches(spec, 100 + n, engine.grid)).hex() for n in range(2)]
    out = {
        "loss": losses,
        "grad_norm": norms,
        "eval": evaluations,
        "needs_data": engine.needs_data,
        "final": dump(engine),
    }
    engine.close()
    return out


def judge(env: RankEnv, job: dict[str, Any], steps: int) -> list[str]:
    """The loss that the step after ``steps`` steps has on the samples that :func:`train` evaluates with first."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    for step in range(1, steps + 1):
        engine.train_step(step, batches(spec, step, engine.grid))
    result = engine.train_step(steps + 1, batches(spec, 100, engine.grid))
    engine.close()
    return [result.loss.hex()]
