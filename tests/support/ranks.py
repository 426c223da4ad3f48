"""What ranks of test gangs run: small functions ``(env, **arguments) -> JSON value``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from jobs.checkpoint.fragments import access, of_owners
from jobs.distributed import Grid
from jobs.engine import Engine, MicroBatch
from jobs.initial import initialise
from jobs.models.gpt import Decoder, Norm, Recipe
from jobs.models.moe import Router
from jobs.parallel.meta import ParamMeta
from jobs.parallel.vocabulary import IGNORE
from jobs.spec import JobSpec, RankEnv
from jobs.weights import open_weights
from strategies.codec import from_json, to_json
from strategies.deepspeed_config import learning_rate
from strategies.schedule import SampleSchedule
from tests.support.exchanges import counted


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


def train_from(env: RankEnv, job: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train from the weights that the job names.

    Returns:
        Losses in hexadecimal, the initial weights (:func:`dump`), whether every master is one of theirs to the bit, and
        the samples of the first step.
    """
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    initialise(engine, spec)
    assert spec.initial is not None
    source = open_weights(spec.initial, spec.model)
    exact = True
    optimizer = access(engine.ds)
    for owners in optimizer.resident(write=False):
        for fragment in of_owners(optimizer.fragments(), owners):
            values = np.empty(fragment.slice.elements, dtype=np.float32)
            source.read_slice(fragment.slice, values)
            master = optimizer.view(fragment, "master")
            assert master is not None
            exact &= torch.equal(master.cpu(), torch.from_numpy(values))
    initial = dump(engine)
    results = [engine.train_step(step, batches(spec, step, engine.grid)) for step in range(1, steps + 1)]
    engine.close()
    lines = [sample(spec, index).tolist() for index in range(spec.batch.global_batch)]
    losses = [result.loss.hex() for result in results]
    return {"loss": losses, "initial": initial, "masters_exact": exact, "lines": lines}


def train(env: RankEnv, job: dict[str, Any], steps: int, weights: bool = False) -> dict[str, Any]:
    """Train ``steps`` steps.

    Returns:
        Losses, norms and rates in hexadecimal; what kind of engine it was; per step, the rows that it gave to other
        ranks on the way to experts and back, gradients included (``crossed``); how many tokens of a sequence its norms
        got (``held``); with ``weights``, the initial and final weights whose primary copy is here (:func:`dump`).
    """
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    initial = dump(engine) if weights else []
    results, crossed = [], []
    with counted(engine.grid) as exchanges, tokens_of_norms(engine) as held:
        for step in range(1, steps + 1):
            results.append(engine.train_step(step, batches(spec, step, engine.grid)))
            crossed.append(exchanges.take_crossed())
    out = {
        "engine": type(engine.ds).__name__,
        "optimizer": type(engine.ds.optimizer).__name__,
        "zero_stage": int(engine.ds.zero_optimization_stage()),
        "grid": [engine.grid.pipe, engine.grid.data, engine.grid.model],
        "loss": [result.loss.hex() for result in results],
        "grad_norm": [result.grad_norm.hex() for result in results],
        "lr": [result.lr.hex() for result in results],
        "moe": [to_json(result.moe) for result in results if result.moe],
        "crossed": crossed,
        "held": sorted(held),
        "initial": initial,
        "final": dump(engine) if weights else [],
    }
    engine.close()
    return out


@contextmanager
def tokens_of_norms(engine: Engine) -> Iterator[set[int]]:
    """How many tokens of a sequence the norms on this rank get: all lengths that they see, filled as they do."""
    found: set[int] = set()
    norms = [module for module in engine.module.modules() if isinstance(module, Norm)]
    hooks = [norm.register_forward_pre_hook(lambda _, inputs: found.add(inputs[0].shape[1])) for norm in norms]
    yield found
    for hook in hooks:
        hook.remove()


def dump(engine: Engine) -> list[dict[str, Any]]:
    """The weights whose primary copy is on this rank, as fp32 in base 64; collective under ZeRO-3."""
    grid = engine.grid
    # replicas that hold experts of their own; to DeepSpeed, the ranks of a sequence are replicas
    own = {id(_meta(one)): grid.ep if hasattr(one, "group_name") else 1 for _, one in engine.named_parameters()}
    values = [(meta, value) for meta, value in engine.weights() if meta.primary]
    primary = [(meta, value) for meta, value in values if grid.data * grid.sp + grid.seq < own[id(meta)]]
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
    losses, norms, aux = [], [], []
    routers: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _module, _inputs, logits: routers.append(logits))
    for step in range(1, steps + 1):
        rate = learning_rate(
            step, lr=recipe.lr, min_lr=recipe.min_lr, warmup_steps=recipe.warmup_steps, steps=recipe.steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        indices = SampleSchedule(global_batch=spec.batch.global_batch).step_range(step)
        lines = torch.stack([sample(spec, index + (step == shift_at)) for index in indices])
        loss = F.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())
        added, parts = auxiliary(spec, routers)
        aux.append(parts)
        torch.autograd.backward(loss + added)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss).hex())
        norms.append(float(norm).hex())
    final = [_entry(_meta(p), p.detach()) for p in model.parameters()]
    return {"loss": losses, "grad_norm": norms, "aux": aux, "final": final}


def auxiliary(spec: JobSpec, routers: list[torch.Tensor]) -> tuple[torch.Tensor, list[float]]:
    """What the routers' losses add to the loss, from their outputs; and the two losses. Empties the list."""
    balance, z = torch.zeros(()), torch.zeros(())
    for logits in routers:
        moe = spec.model.moe
        assert moe is not None
        scores = logits.softmax(-1) if moe.routing == "softmax" else logits.sigmoid()
        shares = scores / scores.sum(-1, keepdim=True)
        for row in range(len(logits)):
            best = scores[row].topk(moe.top_k).indices
            wanted = torch.stack([(best == expert).sum() for expert in range(moe.experts)]) / best.numel()
            balance = balance + moe.experts * (wanted * shares[row].mean(0)).sum() / len(logits)
            z = z + (torch.logsumexp(logits[row], -1) ** 2).mean() / len(logits)
    routers.clear()
    if spec.model.moe is None:
        return balance, []
    added = spec.model.moe.balance_weight * balance + spec.model.moe.z_weight * z
    return added, [float(added), float(balance), float(z)]


def unmarked_norm(env: RankEnv, job: dict[str, Any]) -> str:
    """The gradient norm of step 1 in an engine whose parameters have lost our marks."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    for _, parameter in engine.named_parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    result = engine.train_step(1, batches(spec, 1, engine.grid))
    engine.close()
    return result.grad_norm.hex()


def deepspeeds_norm(env: RankEnv, job: dict[str, Any]) -> str:
    """The gradient norm of step 1 as DeepSpeed computes it where experts are spread."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    engine._expert_norm = None
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


def gradients_that_overflow(env: RankEnv, job: dict[str, Any], steps: int) -> list[tuple[float, bool, float]]:
    """Train with gradients that are infinite at any loss scale: (loss, overflow, gradient norm) of every step."""
    spec = from_json(JobSpec, job)
    engine = Engine.build(spec, env)
    for parameter in engine.module.parameters():
        parameter.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
    results = [engine.train_step(step, batches(spec, step, engine.grid)) for step in range(1, steps + 1)]
    engine.close()
    return [(result.loss, result.overflow, result.grad_norm) for result in results]
