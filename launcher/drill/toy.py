"""An experiment at toy width: the same kinds of parallelism, on as many ranks as a small machine can carry. Pure.

Only sizes change: every degree above 1 stays above 1 (but see :func:`fit`), and so do virtual stages, micro-batches,
accumulation, uneven stages and a batch that grows; a model keeps its flavour, the ratio of its heads and of its
feed-forward blocks, and its experts. What cannot run at all (:mod:`launcher.drill.concessions`) is replaced by what
can, and the difference says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from launcher import build
from launcher.data_schema import DataConfig
from launcher.drill.changes import Change, differences, shown, unchanged, with_changes
from launcher.drill.concessions import runnable
from launcher.host.accelerator import Devices
from launcher.host.dealing import Deal, deal
from launcher.schema import CheckpointConfig, ClusterConfig, Config, ModelConfig, StrategyConfig, TrainConfig
from strategies.errors import ConfigError, PlanInfeasible
from strategies.plan import ParallelPlan
from strategies.ramp import Ramp
from strategies.specs import MoeSpec

MOST_RANKS = 8
NODES = 2
STEPS = 20
EVERY = 3  # steps between checkpoints
CORPUS = "corpus.txt"  # what it learns
NUMERIC_STEP = 18  # of the faults that spoil numbers: all share one oracle; a spike needs 16 losses before it
_WIDTH, _LEAST_HEAD, _MOST_HEAD = 64, 4, 16
_MOST_EXPERTS, _MOST_GROUP = 16, 16
_VOCAB, _SEQ = 300, 16
_ROWS = 4
_RAMP_STEPS = 12  # of the smallest size: six steps of that, three of twice as many, then the full batch
_DEGREES = ("tp", "pp", "dp", "sp", "cp")
_REPLICAS = ("dp", "sp", "cp")  # whose ranks share the experts

_TEXT = "a small text of its own"
_WHY = {
    **dict.fromkeys((f"data.{key}" for key in ("kind", "path", "sources", "tokenizer", "validation")), _TEXT),
    "data.cache": "beside its text",
    "train.eval_every": "nothing is kept from training",
    "train.deterministic": "runs are compared bit by bit",
    "cluster.kind": "on this machine",
    "cluster.hardware": "nothing is predicted of this machine",
    "cluster.device_memory_bytes": "nothing is predicted of this machine",
    "tracking.kind": "nobody's experiment",
    "train.lr": "so that few steps learn something",
    "train.init_from": "weights of the full width",
    "train.spike_sigmas": "faults of numbers are to be noticed",
    "checkpoint.url": "in the run directory",
    "checkpoint.memory_share": "the steps of the run are long",
    "recovery.save_timeout_s": "a stuck disk is to be noticed soon",
    "strategy.offload_path": "in host memory",
    "model.from_hf": "narrower",
    "model.head_width": "hidden / heads",
    "model.position_rows": "that of the flavour",
    "planner.framework": "what trains here",
    "experiment.require_faults": "its faults are its own",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where a rehearsal takes place.

    Attributes:
        kind: The cluster on this machine: ``local`` has Ray, ``process`` has not.
        spares: Nodes that stand by.
        changes: Configuration keys that are other than in the experiment for its sake.
        compared: Its runs are compared bit by bit.
    """

    kind: Literal["local", "process"]
    spares: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)
    compared: bool = False


DRILL = Setting(kind="process", compared=True, changes={"recovery.save_timeout_s": 6.0})
SUBMIT = Setting(kind="local", spares=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    """A rehearsal's configuration.

    Attributes:
        config: What is run.
        plan: Its plan.
        changes: How it differs from the experiment.
        same: What does not differ, by key.
    """

    config: Config
    plan: ParallelPlan
    changes: tuple[Change, ...]
    same: Mapping[str, Any]


def shrink(config: Config, setting: Setting = DRILL, found: Devices | None = None) -> Toy:
    """Make an experiment small.

    Args:
        config: The experiment.
        setting: Where it is rehearsed.
        found: The devices of this machine.

    Raises:
        ConfigError: It is no training; or the size of its cluster is not known.
        PlanInfeasible: Its plan is illegal, or no small plan of its kind runs.
    """
    if config.job.kind != "pretrain":
        raise ConfigError(
            f"job={config.job.kind} cannot be rehearsed at toy width: its model is its own.",
            hint="What is rehearsed is training: job=pretrain.",
        )
    sketch = build.outline(config)
    if sketch.broken:
        raise PlanInfeasible(sketch.broken, hint="phalanx plan with the same overrides shows the whole picture.")
    degrees = shareable(fit({name: getattr(sketch.plan, name) for name in _DEGREES}), sketch.plan.ep)
    reduced, reasons = runnable(_reduced(config, sketch.plan, degrees, setting))
    reasons |= {
        f"strategy.{name}": f"at most {MOST_RANKS} ranks"
        for name, now in degrees.items()
        if now == 1 < getattr(sketch.plan, name)
    }
    if setting.spares:
        reasons["cluster.spares"] = "one takes the place of a node that dies"
    plan = build.outline(reduced).plan
    small = replace(reduced, cluster=_cluster(config.cluster, plan.world_size, setting))
    dealt = _dealt(small.cluster, found)
    if dealt.shares and setting.compared:
        small = with_changes(small, {"train.deterministic": True})
    before, after = shown(config, sketch.plan), shown(small, plan)
    return Toy(
        config=small,
        plan=plan,
        changes=(*differences(before, after, _WHY | reasons), *_device(config.cluster, dealt)),
        same=unchanged(before, after),
    )


def _dealt(small: ClusterConfig, found: Devices | None) -> Deal:
    return deal(found, nodes=small.nodes or 1, slots=small.slots_per_node or 1)


def _device(cluster: ClusterConfig, dealt: Deal) -> tuple[Change, ...]:
    """What the rehearsal computes on."""
    why = dealt.why or ("on this machine, node by node" if dealt.shares else "this machine has no device for ranks")
    changed = str(cluster.device).upper() != dealt.where
    return (Change(key="cluster.device", was=cluster.device, now=dealt.where, why=why),) if changed else ()


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


def _reduced(config: Config, plan: ParallelPlan, degrees: Mapping[str, int], setting: Setting) -> Config:
    """The experiment with every size reduced; it may not run yet."""
    model = _model(config.model, plan, degrees)
    changed = replace(
        config,
        model=model,
        data=DataConfig(kind="text", path=CORPUS, packing=config.data.packing),
        cluster=_cluster(config.cluster, math.prod(degrees.values()), setting),
        strategy=_strategy(plan, degrees, model.moe.experts if model.moe else 1),
        train=_train(config.train, plan, degrees),
        checkpoint=_checkpoint(config.checkpoint),
        recovery=replace(config.recovery, min_nodes=None),
        tracking=replace(config.tracking, kind="none"),
        experiment=replace(config.experiment, require_faults=False),
        planner=replace(config.planner, framework="megatron"),
        faults=(),
    )
    return with_changes(changed, setting.changes)


def _checkpoint(policy: CheckpointConfig) -> CheckpointConfig:
    """Copies in memory as often as asked for: steps of this size would make them seldom, those of the run do not."""
    return replace(policy, every=EVERY, memory_share=0.0, keep=max(3, policy.keep), url=None)


# ---- the plan ---------------------------------------------------------------------------------------------------


def _strategy(plan: ParallelPlan, degrees: Mapping[str, int], experts: int) -> StrategyConfig:
    keys = ("zero_stage", "schedule", "recompute", "grad_dtype", "offload", "flash", "sequence_parallel")
    kept: dict[str, Any] = {key: getattr(plan, key) for key in keys} | dict(degrees)
    stages = _stages(plan, degrees["pp"])
    return StrategyConfig(
        **kept,
        ep=_shares(plan, degrees, experts),
        vpp=min(2, plan.vpp),
        micro_batch=min(2, plan.micro_batch),
        stages=stages if len({*stages}) > 1 else None,
    )


def shareable(degrees: Mapping[str, int], ep: int) -> dict[str, int]:
    """Degrees with a replica less where experts in up to ``ep`` shares, but more than one, would not go round."""
    small = dict(degrees)
    while ep > 1 and _room(small) > 1 and not any(_room(small) % size == 0 for size in range(2, ep + 1)):
        small[max(_REPLICAS, key=lambda one: small[one])] -= 1
    return small


def _shares(plan: ParallelPlan, degrees: Mapping[str, int], experts: int) -> int:
    """In how many shares the experts are: in few, but not in one where they are in several."""
    if plan.ep == 1:
        return 1
    fitting = [size for size in range(2, plan.ep + 1) if _room(degrees) % size == 0]
    return next((size for size in fitting if experts % size == 0), fitting[0])


def _room(degrees: Mapping[str, int]) -> int:
    return math.prod(degrees[name] for name in _REPLICAS)


def _stages(plan: ParallelPlan, pp: int) -> tuple[int, ...]:
    """Blocks per stage: as few as the schedule takes, one more where the experiment's stages are longer."""
    least = 2 if plan.schedule != "1f1b" and pp > 1 else 1
    picked = [plan.stages[stage * plan.pp // pp] for stage in range(pp)]
    stages = tuple(least + (blocks > min(picked)) for blocks in picked)
    return (2,) if stages == (1,) else stages


# ---- the model --------------------------------------------------------------------------------------------------


def _model(model: ModelConfig, plan: ParallelPlan, degrees: Mapping[str, int]) -> ModelConfig:
    tp, split = degrees["tp"], degrees["tp"] * degrees["sp"]
    kv_heads = model.kv_heads or model.heads
    grouped = min(_MOST_GROUP, model.heads // kv_heads) if kv_heads < model.heads else 1
    heads = max(2, split * grouped)
    hidden = heads * max(_LEAST_HEAD, min(_MOST_HEAD, _WIDTH // heads // 2 * 2))
    unit = split * degrees["cp"] * 2
    return replace(
        model,
        layers=sum(_stages(plan, degrees["pp"])),
        hidden=hidden,
        heads=heads,
        kv_heads=heads // grouped if model.kv_heads else None,
        ffn=_scaled(model.ffn, model, hidden, tp) if model.ffn else None,
        vocab=_VOCAB,
        seq=-(-_SEQ // unit) * unit,
        head_width=None,
        position_rows=None,
        from_hf=None,
        moe=_experts(model.moe, model, plan, hidden, degrees) if model.moe else None,
    )


def _scaled(inner: int, model: ModelConfig, hidden: int, tp: int) -> int:
    """The inner width of a feed-forward block in the same ratio to the narrow model, for every shard the same."""
    return max(1, round(inner / model.hidden * hidden / tp)) * tp


def _experts(moe: MoeSpec, model: ModelConfig, plan: ParallelPlan, hidden: int, degrees: Mapping[str, int]) -> MoeSpec:
    """As many experts per token, of fewer in all where there are very many, and so many that shares are equal."""
    tp, experts = degrees["tp"], moe.experts if moe.experts <= _MOST_EXPERTS else max(_MOST_EXPERTS, 2 * moe.top_k)
    experts += -experts % _shares(plan, degrees, experts)
    return replace(
        moe,
        experts=experts,
        ffn=_scaled(moe.ffn, model, hidden, tp),
        dense_layers=min(1, moe.dense_layers),
        shared_ffn=_scaled(moe.shared_ffn, model, hidden, tp) if moe.shared_ffn else 0,
    )


# ---- the recipe and the machine -----------------------------------------------------------------------------------


def _train(train: TrainConfig, plan: ParallelPlan, degrees: Mapping[str, int]) -> TrainConfig:
    full = plan.schedule != "1f1b" and degrees["pp"] > 1
    least = degrees["dp"] * min(2, plan.micro_batch) * (2 * degrees["pp"] if full else 1)
    rows = max(_ROWS, least * (1 if full else min(2, plan.grad_accum)))
    return replace(
        train,
        steps=STEPS,
        tokens=None,
        global_batch=3 * rows if train.ramp else rows,
        ramp=Ramp(start=rows, increment=rows, samples=_RAMP_STEPS * rows) if train.ramp else None,
        init_from=None,
        lr=1e-3,
        min_lr=None,
        warmup_steps=min(2, train.warmup_steps),
        spike_sigmas=train.spike_sigmas or 10.0,
        skips=(),
        eval_every=0,
        sample_tokens=0,
    )


def _cluster(cluster: ClusterConfig, world: int, setting: Setting) -> ClusterConfig:
    """This machine, as two nodes: one can be lost."""
    nodes = NODES if world % NODES == 0 else min(world, NODES)
    return ClusterConfig(
        name=setting.kind,
        kind=setting.kind,
        nodes=nodes,
        slots_per_node=-(-world // nodes),
        spares=setting.spares,
        device=cluster.device,
    )
