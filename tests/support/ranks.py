"""What ranks of test gangs run: small functions ``(env, **arguments) -> JSON value``."""

from __future__ import annotations

import base64
import hashlib
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F

from jobs.distributed import Grid
from jobs.engine import Engine, MicroBatch
from jobs.models.gpt import Decoder, Recipe
from jobs.parallel.meta import ParamMeta
from jobs.parallel.vocabulary import IGNORE
from jobs.spec import JobSpec, RankEnv
from strategies.codec import from_json, to_json
from strategies.deepspeed_config import learning_rate
from strategies.schedule import SampleSchedule


def sample(job: JobSpec, index: int) -> torch.Tensor:
    """``[seq + 1]`` tokens, a function of the index: noisy arithmetic progressions, which can be learnt."""
    generator = torch.Generator().manual_seed(index)
    start, stride = (int(x) for x in torch.randint(1, job.model.vocab, (2,), generator=generator))
    line = (start + stride * torch.arange(job.model.seq + 1)) % job.model.vocab
    noise = torch.randint(0, job.model.vocab, (job.model.seq + 1,), generator=generator)
    return torch.where(torch.rand(job.model.seq + 1, generator=generator) < 0.1, noise, line)


def batches(job: JobSpec, step: int, grid: Grid) -> list[MicroBatch]:
    """The micro-batches of one rank; padding rows have no targets."""
    schedule = SampleSchedule(global_batch=job.batch.global_batch)
    held = grid.tokens(job.model.seq)
    out = []
    for micro in range(job.plan.grad_accum):
        tokens = torch.zeros((job.plan.micro_batch, job.model.seq), dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE)
        for row, index in enumerate(schedule.rows(step, grid.data, micro, job.plan)):
            if index is not None:
                line = sample(job, index)
                tokens[row], targets[row] = line[:-1], line[1:]
        out.append((tokens[:, held], targets[:, held]))
    return out


def train(env: RankEnv, job: dict[str, Any], steps: int, weights: bool = False) -> dict[str, Any]:
    """Train ``steps`` steps.

    Returns:
        Losses, norms and rates in hexadecimal; what kind of engine it was; with ``weights``, the initial and final
        weights whose primary copy is here (:func:`dump`).
    """
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    initial = dump(engine) if weights else []
    results = [engine.train_step(step, batches(spec, step, engine.grid)) for step in range(1, steps + 1)]
    out = {
        "engine": type(engine.ds).__name__,
        "optimizer": type(engine.ds.optimizer).__name__,
        "zero_stage": int(engine.ds.zero_optimization_stage()),
        "grid": [engine.grid.pipe, engine.grid.data, engine.grid.model],
        "loss": [result.loss.hex() for result in results],
        "grad_norm": [result.grad_norm.hex() for result in results],
        "lr": [result.lr.hex() for result in results],
        "initial": initial,
        "final": dump(engine) if weights else [],
    }
    engine.close()
    return out


def dump(engine: Engine) -> list[dict[str, Any]]:
    """The weights whose primary copy is on this rank, as fp32 in base 64; collective under ZeRO-3."""
    first = (engine.grid.data, engine.grid.seq) == (0, 0)
    primary = [(meta, value) for meta, value in engine.weights() if meta.primary and first]
    return [_entry(meta, value) for meta, value in primary]


def _entry(meta: ParamMeta, value: torch.Tensor) -> dict[str, Any]:
    data = base64.b64encode(value.float().cpu().contiguous().numpy().tobytes()).decode()
    return {"name": meta.name, "shape": meta.shape, "box": meta.box, "data": data}


def train_plainly(env: RankEnv, job: dict[str, Any], steps: int, shift_at: int = 0) -> dict[str, Any]:
    """The same training without DeepSpeed and without our parallel loss: a plain torch loop over the whole batch.

    One rank; returns what :func:`train` returns of losses, norms and weights. At step ``shift_at`` the batch starts
    one sample late.
    """
    spec = from_json(JobSpec, job)
    recipe = spec.train
    torch.set_num_threads(1)
    model = Decoder(Recipe.of(spec.model, Grid(), seed=recipe.seed))
    betas = (recipe.beta1, recipe.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    losses, norms = [], []
    for step in range(1, steps + 1):
        rate = learning_rate(
            step, lr=recipe.lr, min_lr=recipe.min_lr, warmup_steps=recipe.warmup_steps, steps=recipe.steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = SampleSchedule(global_batch=spec.batch.global_batch).step_range(step)
        lines = torch.stack([sample(spec, index + (step == shift_at)) for index in indices])
        loss = F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss).hex())
        norms.append(float(norm).hex())
    return {"loss": losses, "grad_norm": norms, "final": [_entry(_meta(p), p.detach()) for p in model.parameters()]}


def unmarked_norm(env: RankEnv, job: dict[str, Any]) -> str:
    """The gradient norm of step 1 in an engine whose parameters have lost our marks."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    for _, parameter in engine.named_parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    result = engine.train_step(1, batches(spec, 1, engine.grid))
    engine.close()
    return result.grad_norm.hex()


def describe(env: RankEnv, job: dict[str, Any]) -> dict[str, Any]:
    """What an engine is before it trains: coordinates, groups, parameters."""
    engine = Engine.build(from_json(JobSpec, job), env)
    grid = engine.grid
    groups = {"tp": grid.model_group, "dp": grid.data_group, "pp": grid.pipe_group}
    try:
        engine.train_step(1, [])
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    out = {
        "coordinates": [grid.pipe, grid.data, grid.model],
        "groups": {name: dist.get_process_group_ranks(group) if group else [] for name, group in groups.items()},
        "needs_data": engine.needs_data,
        "parameters": [[name, *to_json(_meta(p)).values()] for name, p in engine.named_parameters()],
        "local_shapes": [list(getattr(p, "ds_shape", p.shape)) for _, p in engine.named_parameters()],
        "threads": torch.get_num_threads(),
        "refusal": refusal,
    }
    engine.close()
    return out


def fingerprints(env: RankEnv, job: dict[str, Any], steps: int) -> list[list[Any]]:
    """[name, box, SHA-256 of the values] of every parameter on this rank, copies included, after training."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    for step in range(1, steps + 1):
        engine.train_step(step, batches(spec, step, engine.grid))
    out = [
        [meta.name, meta.box, hashlib.sha256(value.float().cpu().contiguous().numpy().tobytes()).hexdigest()]
        for meta, value in engine.weights()
    ]
    engine.close()
    return out


def _meta(parameter: torch.Tensor) -> ParamMeta:
    return cast(ParamMeta, parameter.phalanx)  # type: ignore[attr-defined]
