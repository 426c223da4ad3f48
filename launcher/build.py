"""From a typed configuration to the specs, the plan and the launch request. Pure: no files, no clock, no network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.spec import InferenceSpec, JobSpec, TrainSpec, engine_config
from jobs.weights import find
from launcher.data_checks import data_spec
from launcher.findings import Findings
from launcher.request import LaunchRequest
from launcher.saving import address, checkpoint_spec, disk_steps, patient
from launcher.schema import Config
from launcher.schema_job import JobConfig
from launcher.script_plan import script_plan
from strategies import rules
from strategies.capabilities import MODELLED_ONLY
from strategies.errors import ConfigError, PlanInfeasible, Violation
from strategies.plan import ParallelPlan
from strategies.resolve import resolve_plan
from strategies.rotary import scaled_base
from strategies.saving import Saving
from strategies.schedule import SampleSchedule
from strategies.specs import BatchSpec, ClusterSpec, ModelSpec
from strategies.workload import Workload, run_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """What a configuration amounts to, legal or not: what ``plan`` shows.

    Attributes:
        model: The model.
        batch: The work of one step.
        cluster: The machine.
        plan: The plan, everything derived.
        violations: Every broken rule; none means that it can run.
    """

    model: ModelSpec
    batch: BatchSpec
    cluster: ClusterSpec
    plan: ParallelPlan
    violations: tuple[Violation, ...]

    @property
    def broken(self) -> tuple[Violation, ...]:
        """What makes the plan senseless; without it, a plan that cannot be run can be planned with."""
        return tuple(one for one in self.violations if one.rule not in MODELLED_ONLY)


def settle(config: Config, *, name: str, cwd: Path) -> Config:
    """The configuration with its name and with absolute paths, so that it means the same from any folder.

    Args:
        config: As composed.
        name: Name of the run if the configuration gives none.
        cwd: Folder that relative paths start from.
    """

    def absolute(path: str) -> str:
        return os.path.abspath(cwd / Path(path).expanduser())

    run_dir, data, strategy = absolute(config.run.dir), config.data, config.strategy
    return replace(
        config,
        run=replace(config.run, dir=run_dir, name=config.run.name or name),
        data=replace(
            data,
            path=absolute(data.path) if data.path else data.path,
            cache=absolute(data.cache) if data.cache else os.path.join(run_dir, ".data"),
            tokenizer=absolute(data.tokenizer) if data.tokenizer else data.tokenizer,
            sources=tuple(replace(one, path=absolute(one.path)) if one.path else one for one in data.sources),
        ),
        model=replace(config.model, from_hf=_place(config.model.from_hf, absolute)),
        train=replace(config.train, init_from=_place(config.train.init_from, absolute)),
        job=replace(config.job, **_places(config.job, absolute)),
        checkpoint=replace(config.checkpoint, url=address(config.checkpoint.url, absolute)),
        strategy=replace(strategy, offload_path=absolute(strategy.offload_path) if strategy.offload_path else None),
    )


def _places(job: JobConfig, absolute: Callable[[str], str]) -> dict[str, Any]:
    """The paths of the section ``job``, absolute."""
    files = {name: getattr(job, name) for name in ("tokenizer", "text", "choices", "prompts")}
    found = {name: absolute(path) if path else path for name, path in files.items()}
    return found | {"workdir": absolute(job.workdir), "weights": _place(job.weights, absolute)}


def _place(path: str | None, absolute: Callable[[str], str]) -> str | None:
    """An absolute path, what says of which kind it is kept; addresses in an object store are absolute already."""
    if not path or "://" in path:
        return path
    kind = "hf:" if path.startswith("hf:") else ""
    return kind + absolute(path.removeprefix(kind))


def default_name(config: Config, stamp: str, token: str) -> str:
    """``<model>-<yyyymmdd-hhmmss>-<4 hex digits>``; a script's run is called after its kind."""
    kind = config.job.kind if config.job.kind == "script" else config.model.name
    kind = f"{config.job.kind}-{kind}" if config.job.infers else kind
    return f"{kind}-{stamp}-{token}"


def outline(config: Config, cluster: ClusterSpec | None = None, *, plan: ParallelPlan | None = None) -> Outline:
    """Derive the plan and judge it.

    Args:
        config: The configuration.
        cluster: What an existing cluster reported; None takes the configuration's numbers.
        plan: What ``strategy=auto`` has chosen already; None searches where it is asked for.

    Raises:
        ConfigError: The size of an existing cluster is needed and not known.
    """
    machine = cluster or cluster_spec(config)
    missing = _missing_nodes(config, machine)
    model, batch = model_spec(config), batch_spec(config)
    if config.job.kind == "script":
        plan, found = script_plan(config, machine)
        return Outline(model=model, batch=batch, cluster=machine, plan=plan, violations=(*missing, *found))
    precision = config.train.precision
    if config.strategy.auto:
        from launcher.auto import best_plan

        plan = plan or best_plan(config, model, batch, machine)
    else:
        plan = _balanced(config, resolve_plan(model, batch, machine, precision, **config.strategy.asked()), machine)
    ours = config.planner.framework == "megatron"  # else what is planned with is other training code
    parts: dict[str, Any] = {"model": model, "plan": plan, "batch": batch, "cluster": machine, "precision": precision}
    found = rules.check(**parts, engine=ours, left_open=_left_open(config))
    return Outline(model=model, batch=batch, cluster=machine, plan=plan, violations=(*missing, *found))


def _left_open(config: Config) -> frozenset[str]:
    """What :func:`strategies.resolve.resolve_plan` derives of the plan because nobody gave it."""
    return frozenset({"dp", "zero_stage", "stages", "grad_accum", "grad_dtype"} - set(config.strategy.asked()))


def _balanced(config: Config, plan: ParallelPlan, machine: ClusterSpec) -> ParallelPlan:
    """The plan with its stages cut as asked for.

    Raises:
        ConfigError: Times are asked for, and the cluster has no hardware figures.
    """
    balance, model, batch, precision = (
        config.strategy.balance,
        model_spec(config),
        batch_spec(config),
        config.train.precision,
    )
    if balance is None or balance == "blocks":
        return plan
    parts: dict[str, Any] = {"model": model, "plan": plan, "batch": batch, "cluster": machine, "precision": precision}
    if rules.check(**parts, modelled=True, brief=True):
        return plan  # is refused anyway
    from strategies.balance import balanced

    framework = config.planner.framework
    work = Workload(
        model=model,
        batch=batch,
        cluster=machine,
        precision=precision,
        framework=framework,
        packing=config.data.packing,
    )
    return balanced(plan, work, balance)


def workload(config: Config, sketch: Outline) -> Workload | None:
    """What the planner estimates plans of; None when the cluster says nothing about its hardware."""
    return work_of(config, sketch.model, sketch.batch, sketch.cluster)


def work_of(config: Config, model: ModelSpec, batch: BatchSpec, machine: ClusterSpec) -> Workload | None:
    """The same, before there is an outline."""
    if machine.hardware is None or config.job.kind != "pretrain":
        return None
    tokens = config.train.tokens
    return Workload(
        model=model,
        batch=batch,
        cluster=machine.watched(config.recovery.detect_s),
        precision=config.train.precision,
        framework=config.planner.framework,
        tokens=float(run_tokens(batch, config.train.steps)) if tokens is None else tokens,
        saving=Saving(config.checkpoint.every, config.checkpoint.memory_every, config.checkpoint.memory_share),
        packing=config.data.packing,
    )


def existing_address(config: Config) -> str:
    """Where the existing cluster is.

    Raises:
        ConfigError: The configuration does not say it.
    """
    if not config.cluster.address:
        raise ConfigError(
            f"cluster.address: missing; without it the cluster '{config.cluster.name}' can be planned for only.",
            hint=f"cluster={config.cluster.name} cluster.address=IP:PORT",
        )
    return config.cluster.address


def _missing_nodes(config: Config, machine: ClusterSpec) -> list[Violation]:
    """What the configuration asks of an existing cluster and the cluster does not have."""
    there = f"{machine.nodes} nodes x {machine.slots_per_node} slots"
    found = []
    for key, have in (("nodes", machine.nodes), ("slots_per_node", machine.slots_per_node)):
        asked = getattr(config.cluster, key)
        if asked is not None and asked > have:
            message = f"cluster.{key}={asked} is asked for, the cluster has {there}"
            found.append(Violation(rule=f"cluster_has_{key}", message=message, hint=f"cluster.{key}={have}"))
    return found


def flaws(config: Config, sketch: Outline) -> Findings:
    """All that is wrong with a plan and with what is asked of its ranks and steps."""
    found = Findings()
    if sketch.violations:
        hint = "phalanx plan with the same overrides shows the whole picture."
        found.add(PlanInfeasible(sketch.violations, hint=hint))
    return _asked(config, sketch, found)


def require_asked(config: Config, sketch: Outline) -> None:
    """Refuse what is asked of ranks and steps and cannot be, with all that is wrong with their plan.

    Raises:
        ConfigError: Faults or skips do not fit the run.
    """
    if _asked(config, sketch, Findings()):
        flaws(config, sketch).refuse()


def _asked(config: Config, sketch: Outline, found: Findings) -> Findings:
    found.of(lambda: SampleSchedule(global_batch=1, skips=config.train.skips))
    found.of(lambda: resolved_faults(config, sketch))
    return found


def build_request(
    config: Config, overrides: Sequence[str], cluster: ClusterSpec | None = None, *, sketch: Outline | None = None
) -> LaunchRequest:
    """The request that submit sends; its data are not prepared yet.

    Args:
        config: A settled configuration.
        overrides: What the user typed.
        cluster: What an existing cluster reported.
        sketch: What the configuration amounts to, if that is known already.

    Raises:
        PlanInfeasible: The plan breaks rules; all of them are listed.
        ConfigError: The faults or skips do not fit the run, too, or the address of an existing cluster is missing.
    """
    sketch = sketch or outline(config, cluster)
    flaws(config, sketch).refuse()
    if config.cluster.kind == "existing":
        existing_address(config)
    assert config.run.name is not None
    run_dir, work = Path(config.run.dir) / config.run.name, workload(config, sketch)
    return LaunchRequest(
        run_name=config.run.name,
        run_dir=str(run_dir),
        job=_job(config, sketch, work, run_dir),
        cluster=sketch.cluster,
        recovery=patient(config.recovery, work, sketch.plan),
        tracking=config.tracking,
        overrides=tuple(overrides),
    )


def _job(config: Config, sketch: Outline, work: Workload | None, run_dir: Path) -> JobSpec:
    script, weights = config.job.kind == "script", config.job.weights if config.job.infers else config.train.init_from
    train = train_spec(config)
    return JobSpec(
        run_id=str(config.run.name),
        kind=config.job.kind,
        model=sketch.model,
        plan=sketch.plan,
        batch=sketch.batch,
        train=train,
        data=data_spec(config),
        checkpoint=checkpoint_spec(config, work, sketch.plan, run_dir),
        deepspeed=engine_config(sketch.plan, train, sketch.batch) if config.job.kind == "pretrain" else {},
        skips=config.train.skips,
        faults=resolved_faults(config, sketch),
        command=config.job.command or "" if script else "",
        workdir=str(run_dir / "user") if script else "",
        initial=find(weights) if weights else None,
        inference=inference_spec(config),
    )


def inference_spec(config: Config) -> InferenceSpec | None:
    """What a job that only computes is asked; None for others. Its rows are not prepared yet."""
    job = config.job
    if not job.infers:
        return None
    texts = ("text", "choices", "prompts", "prompt", "tokenizer")
    values: dict[str, Any] = {name: getattr(job, name) or "" for name in texts}
    numbers: dict[str, Any] = {
        name: getattr(job, name) for name in ("shots", "tokens", "temperature", "top_k", "top_p")
    }
    return InferenceSpec(**values, **numbers)


def resolved_faults(config: Config, sketch: Outline) -> tuple[str, ...]:
    """The faults to inject, without ``random``.

    Raises:
        ConfigError: They do not fit the run.
    """
    if not config.faults:
        return ()
    from jobs.faults import resolve

    work = None if sketch.violations else workload(config, sketch)  # nothing is estimated of an illegal plan
    return resolve(
        config.faults,
        seed=config.fault_seed,
        steps=config.train.steps,
        checkpoint_every=disk_steps(config, work, sketch.plan),
        nodes=-(-sketch.plan.world_size // sketch.cluster.slots_per_node),
        world_size=sketch.plan.world_size,
        pp=sketch.plan.pp,
    )


def outline_deepspeed(config: Config, plan: ParallelPlan) -> dict[str, object]:
    """DeepSpeed's configuration of a plan, for people who want to look at it."""
    return engine_config(plan, train_spec(config), batch_spec(config)) if config.job.kind == "pretrain" else {}


def model_spec(config: Config) -> ModelSpec:
    """The model, derived sizes filled in."""
    model = config.model
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    del values["from_hf"], values["rope_scaling"]
    width = model.head_width or model.hidden // model.heads
    rows = None if (model.flavour, model.position_rows) == ("gpt3", model.seq) else model.position_rows
    derived = {
        "kv_heads": model.kv_heads or model.heads,
        "ffn": model.ffn or 4 * model.hidden,
        "head_width": model.head_width or 0,
        "position_rows": rows,
        "rope_theta": scaled_base(model.rope_theta, model.rope_scaling, width),
    }
    return ModelSpec(**values | derived)


def batch_spec(config: Config) -> BatchSpec:
    """The work of one step, and how it grows."""
    return BatchSpec(global_batch=config.train.global_batch, seq=config.model.seq, ramp=config.train.ramp)


def train_spec(config: Config) -> TrainSpec:
    """The recipe, derived rates filled in."""
    train = config.train
    values = {field.name: getattr(train, field.name) for field in dataclasses.fields(train)}
    for name in ("global_batch", "ramp", "tokens", "skips", "init_from"):
        del values[name]
    return TrainSpec(**values | {"min_lr": train.lr / 10 if train.min_lr is None else train.min_lr})


def cluster_spec(config: Config, found: tuple[int, int] | None = None) -> ClusterSpec:
    """The machine.

    Args:
        config: The configuration.
        found: Nodes and slots per node that a running cluster reported; what is not there cannot be used.

    Raises:
        ConfigError: The size is not known.
    """
    cluster = config.cluster
    nodes, slots = cluster.nodes, cluster.slots_per_node
    if found is not None:
        nodes = min(nodes or max(1, found[0] - cluster.spares), found[0])
        slots = min(slots or found[1], found[1])
    if nodes is None or slots is None:
        raise ConfigError(
            "The size of the existing cluster is not known.",
            hint="Give cluster.nodes=N cluster.slots_per_node=M, or --connect to ask the cluster.",
        )
    values = {field.name: getattr(cluster, field.name) for field in dataclasses.fields(cluster)}
    return ClusterSpec(**values | {"nodes": nodes, "slots_per_node": slots, "address": cluster.address or ""})
