"""An experiment at toy width: the same kinds of parallelism, on as many ranks as a small machine can carry. Pure.

Every degree above 1 stays above 1. What cannot run at all yet (it can only be modelled: experts, sequence parallelism,
some schedules) is replaced by what can, and the difference says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher import build
from launcher.data_schema import DataConfig
from launcher.schema import ClusterConfig, Config, ModelConfig, StrategyConfig, TrainConfig
from strategies.codec import to_json
from strategies.errors import ConfigError, PlanInfeasible
from strategies.plan import ParallelPlan

MOST_RANKS = 8
NODES = 2
STEPS = 20
EVERY = 3  # steps between checkpoints
NUMERIC_STEP = 18  # of the faults that spoil numbers: all share one oracle; a spike needs 16 losses before it
SAVE_TIMEOUT_S = 6.0
_HEAD_WIDTH = 16
_VOCAB, _SEQ = 300, 16
_ROWS = 4

_MODELLED = (
    ("sp", 1),
    ("cp", 1),
    ("schedule", "1f1b"),
    ("vpp", 1),
    ("sequence_parallel", False),
    ("offload", "none"),
    ("recompute", "none"),
    ("grad_dtype", "fp32"),
)
"""What is given up, one after the other, until the plan runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One value of the experiment that is another in the rehearsal."""

    key: str
    was: Any
    now: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    """A rehearsal's configuration.

    Attributes:
        config: What is run.
        plan: Its plan.
        changes: How it differs from the experiment.
    """

    config: Config
    plan: ParallelPlan
    changes: tuple[Change, ...]


def shrink(config: Config) -> Toy:
    """Make an experiment small.

    Raises:
        ConfigError: It is a script, which brings a model of its own; or the size of its cluster is not known.
        PlanInfeasible: Its plan is illegal, or no small plan of its kind runs.
    """
    if config.job.kind == "script":
        raise ConfigError(
            "A script cannot be rehearsed at toy width: its model is its own.",
            hint="phalanx submit job=script faults=[...] injects faults into a run of it.",
        )
    sketch = build.outline(config)
    if sketch.broken:
        raise PlanInfeasible(sketch.broken, hint="phalanx plan with the same overrides shows the whole picture.")
    degrees = fit({name: getattr(sketch.plan, name) for name in ("tp", "pp", "dp", "sp", "cp")})
    small = _small(config, sketch.plan, degrees)
    plan = build.outline(small).plan
    before, after = _shown(config, sketch.plan), _shown(small, plan)
    changes = [Change(key=key, was=was, now=after[key]) for key, was in before.items() if was != after[key]]
    return Toy(config=small, plan=plan, changes=tuple(changes))


def fit(degrees: Mapping[str, int], most: int = MOST_RANKS) -> dict[str, int]:
    """Degrees whose product is at most ``most``: the largest is halved as long as it is above 2.

    Those above 1 stay above 1, except that sequence parallelism goes first where even twos are too many.
    """
    small = dict(degrees)
    while math.prod(small.values()) > most:
        name = max(small, key=lambda one: small[one])
        if small[name] > 2:
            small[name] = max(2, small[name] // 2)
            continue
        name = next((one for one in ("cp", "sp") if small.get(one, 1) > 1), "")
        if not name:
            break  # tp, pp and dp of 2 are what a rehearsal is about
        small[name] = 1
    return small


def _small(config: Config, plan: ParallelPlan, degrees: Mapping[str, int]) -> Config:
    """The first configuration that runs, giving up what is modelled only."""
    strategy = _strategy(plan, degrees)
    changed = replace(
        config,
        model=_model(config.model, tp=degrees["tp"], pp=degrees["pp"]),
        data=DataConfig(kind="text", path=config.data.path, cache=None),
        train=_train(config.train, degrees["dp"]),
        checkpoint=replace(config.checkpoint, every=EVERY, keep=max(3, config.checkpoint.keep), url=None),
        recovery=replace(config.recovery, save_timeout_s=SAVE_TIMEOUT_S),
        tracking=replace(config.tracking, kind="none"),
        experiment=replace(config.experiment, require_faults=False),
        planner=replace(config.planner, framework="megatron"),
        faults=(),
    )
    for tried in _giving_up(strategy):
        found = replace(changed, strategy=tried, cluster=_cluster(config.cluster, tried))
        sketch = build.outline(found)
        if not sketch.violations:
            return found
    raise PlanInfeasible(sketch.violations, what="No small plan of this kind runs:", hint="Rehearse a simpler one.")


def _giving_up(strategy: StrategyConfig) -> Iterator[StrategyConfig]:
    yield strategy
    for key, plain in _MODELLED:
        if getattr(strategy, key) != plain:
            plainer: dict[str, Any] = {key: plain}
            strategy = replace(strategy, **plainer)
            yield strategy
    yield replace(strategy, zero_stage=1)


def _strategy(plan: ParallelPlan, degrees: Mapping[str, int]) -> StrategyConfig:
    keys = ("zero_stage", "schedule", "vpp", "recompute", "grad_dtype", "offload", "flash", "sequence_parallel")
    kept: dict[str, Any] = {key: getattr(plan, key) for key in keys} | dict(degrees)
    return StrategyConfig(**kept, ep=1, micro_batch=1)


def _model(model: ModelConfig, *, tp: int, pp: int) -> ModelConfig:
    grouped = model.kv_heads is not None and model.kv_heads < model.heads
    heads = max(2, 2 * tp if grouped else tp)
    hidden = heads * _HEAD_WIDTH
    return replace(
        model,
        layers=max(2, pp),
        hidden=hidden,
        heads=heads,
        kv_heads=heads // 2 if grouped else None,
        ffn=2 * hidden,
        vocab=_VOCAB,
        seq=_SEQ,
        head_width=None,
        position_rows=None,
        gated=None,
        embed_norm=False,
        moe=None,
        latent=None,
    )


def _train(train: TrainConfig, dp: int) -> TrainConfig:
    return replace(
        train,
        steps=STEPS,
        tokens=None,
        global_batch=max(_ROWS, dp),
        lr=1e-3,
        min_lr=None,
        warmup_steps=0,
        precision=train.precision if train.precision == "fp32" else "bf16",
        spike_sigmas=train.spike_sigmas or 10.0,
        skips=(),
        eval_every=0,
        sample_tokens=0,
    )


def _cluster(cluster: ClusterConfig, strategy: StrategyConfig) -> ClusterConfig:
    """Plain processes on this machine: two nodes, so that one can be lost."""
    world = math.prod(degree or 1 for degree in (strategy.tp, strategy.pp, strategy.dp, strategy.sp, strategy.cp))
    nodes = NODES if world % NODES == 0 else min(world, NODES)
    return ClusterConfig(
        name=cluster.name, kind="process", nodes=nodes, slots_per_node=-(-world // nodes), device=cluster.device
    )


_SHOWN = ("model", "data", "cluster", "train", "checkpoint", "recovery", "tracking")
_UNSHOWN = (
    "cluster.hardware",
    "cluster.device",
    "model.name",
    "data.path",
    "data.cache",
    "tracking.",
    "cluster.address",
)


def _shown(config: Config, plan: ParallelPlan) -> dict[str, Any]:
    """Key -> value of what a rehearsal may change, the plan's values resolved."""
    tree = to_json(config)
    found = {f"{group}.{key}": value for group in _SHOWN for key, value in tree[group].items()}
    found = {key: value for key, value in found.items() if not key.startswith(_UNSHOWN)}
    kept = ("tp", "pp", "dp", "ep", "sp", "cp", "zero_stage", "schedule", "vpp", "recompute", "grad_dtype", "offload")
    resolved = {f"strategy.{key}": getattr(plan, key) for key in (*kept, "sequence_parallel", "micro_batch")}
    return resolved | {"tracking.kind": config.tracking.kind} | found
