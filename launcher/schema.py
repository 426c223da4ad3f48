"""The configuration as types: what every key means, of which type it is, and within which bounds.

The values live in ``conf/`` (one YAML file per choice of a group); this module says what may stand there. A key whose
type admits ``None`` may be left out or set to ``null``: it is then derived, as its docstring says. Pure: no Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from launcher.data_schema import DataConfig
from launcher.request import Budgets, RecoverySpec, TrackingSpec
from launcher.schema_job import JobConfig
from strategies.hardware import FROM_ZERO, Hardware
from strategies.plan import Balance, GradDtype, Offload, Recompute, Schedule
from strategies.ramp import Ramp
from strategies.schedule import Skip
from strategies.specs import Flavour, LatentAttention, MoeSpec, Precision, RotaryStretch
from strategies.workload import Framework


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and what it is called.

    Attributes:
        dir: Parent folder of run directories; for ``cluster=existing`` on a file system that all nodes share.
        name: Name of the run, unique in ``dir``; null makes ``<model>-<yyyymmdd-hhmmss>-<4 hex digits>``.
    """

    dir: str
    name: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
        name: Name of the model, for people.
        flavour: ``gpt3``: LayerNorm, GELU, learned positions. ``llama``: RMSNorm, SwiGLU, rotary positions.
        layers: Transformer blocks.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key/value heads; null means as many as ``heads``.
        ffn: Inner width of the feed-forward block; null means 4 x ``hidden``.
        vocab: Tokens of the tokenizer.
        seq: Sequence length, in tokens.
        tied: The output projection shares the weights of the token embedding.
        norm_eps: Epsilon of the norms.
        init_std: Standard deviation of the initial weights.
        rope_theta: Base of the rotary frequencies (``llama`` only).
        rope_scaling: Sequences so many times as long as those that ``rope_theta`` was for: the base grows by
            ``rope_scaling^(d / (d - 2))``, ``d`` being the width of a head (NTK-aware scaling).
        rope_stretch: Frequencies that slow down, as in Llama 3.1 and later; null for none.
        gated: The feed-forward block has a gate; null means that of the flavour.
        head_width: Width of one head; null means ``hidden / heads``.
        position_rows: Learned positions, at least ``seq``; null means ``seq`` for ``gpt3`` and none for ``llama``.
        embed_norm: A norm follows the token embedding.
        moe: Experts instead of dense feed-forward blocks; null for none.
        latent: Latent attention instead of plain heads; null for none.
        from_hf: Folder of a Hugging Face model (Llama, Mixtral or GPT-2) whose config.json fills in all of the above;
            what is given on the command line beside it still counts. Null for none.
    """

    name: str
    flavour: Flavour
    layers: int
    hidden: int
    heads: int
    kv_heads: int | None = None
    ffn: int | None = None
    vocab: int
    seq: int
    tied: bool = True
    norm_eps: float = 1e-5
    init_std: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: float = 1.0
    rope_stretch: RotaryStretch | None = None
    gated: bool | None = None
    head_width: int | None = None
    position_rows: int | None = None
    embed_norm: bool = False
    moe: MoeSpec | None = None
    latent: LatentAttention | None = None
    from_hf: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The machine.

    Attributes:
        name: Name of the choice, for people.
        kind: ``local``: a Ray cluster of several nodes that phalanx starts on this machine. ``existing``: a running
            Ray cluster. ``process``: plain processes on this machine, without Ray.
        nodes: Nodes that carry ranks; null (``existing`` only) means what Ray reports.
        slots_per_node: Devices per node, one rank each; null (``existing`` only) means what Ray reports.
        spares: Further nodes kept warm.
        address: ``IP:PORT`` of the Ray head, or ``http(s)://HOST:8265`` of its dashboard (``existing`` only); planning
            goes without.
        device: Kind of device, for example ``A100-80GB``: the planner's calibration is kept by it.
        device_memory_bytes: Memory per device; 0 when it does not matter.
        hardware: Speeds, prices and failure rates; null leaves time and cost out of the plan.
    """

    name: str
    kind: Literal["local", "existing", "process"]
    nodes: int | None = None
    slots_per_node: int | None = None
    spares: int = 0
    address: str | None = None
    device: str = "cpu"
    device_memory_bytes: int = 0
    hardware: Hardware | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StrategyConfig:
    """How the model is spread over ranks. Gradient accumulation is always derived from the global batch.

    Attributes:
        auto: The planner chooses the plan: every other key stays null.
        tp: Tensor-parallel degree; null means 1, as for the degrees below.
        pp: Pipeline stages.
        dp: Data-parallel replicas; null means as many as the nodes carry.
        ep: Expert-parallel degree, inside ``dp``.
        sp: Sequence-parallel degree (Ulysses).
        cp: Context-parallel degree.
        zero_stage: ZeRO stage over the replicas; null means 1 with a pipeline or 16-bit
            arithmetic, else 0.
        schedule: Pipeline schedule; null means ``1f1b``.
        vpp: Virtual stages per rank (interleaved schedule).
        stages: Blocks per pipeline stage, first to last; null spreads them as ``balance`` says.
        balance: What stages are even in: ``blocks`` (as null), ``parameters`` of a rank, ``time`` by the planner.
        micro_batch: Sequences per replica and forward pass; null means 1.
        recompute: Activation checkpointing; null means ``none``.
        grad_dtype: Precision in which gradients are accumulated; null means fp32 (with ZeRO-0 in 16 bit: that one).
        offload: What lives in host memory; null means ``none``.
        offload_path: Folder on local disks (NVMe) of every node that it lives in instead; null for host memory.
        flash: Fused attention that never stores the scores; null means true.
        sequence_parallel: Norms and residuals are split over the tensor-parallel ranks (Megatron); null means false.
    """

    auto: bool = False
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    sp: int | None = None
    cp: int | None = None
    zero_stage: int | None = None
    schedule: Schedule | None = None
    vpp: int | None = None
    stages: tuple[int, ...] | None = None
    balance: Balance | None = None
    micro_batch: int | None = None
    recompute: Recompute | None = None
    grad_dtype: GradDtype | None = None
    offload: Offload | None = None
    offload_path: str | None = None
    flash: bool | None = None
    sequence_parallel: bool | None = None

    def asked(self) -> dict[str, Any]:
        """The values that are given, by the names of :func:`strategies.resolve.resolve_plan`."""
        values = {name.name: getattr(self, name.name) for name in fields(self) if name.name not in ("auto", "balance")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The recipe.

    Attributes:
        steps: Optimizer steps of the whole run.
        tokens: Tokens of the whole run, for planning; null means those of ``steps``.
        global_batch: Sequences per optimizer step, over all replicas; with a ramp, those that it grows to.
        ramp: How the batch grows, for example ``{start: 8, increment: 8, samples: 4096}`` or
            ``{points: [{tokens: 0, global_batch: 8}, {tokens: 2e6, global_batch: 32}], tokens: 8e6}``; null for none.
            The learning rate stays a function of the step.
        seed: Seed of the initial weights and of the order of samples.
        lr: Peak learning rate.
        min_lr: Learning rate at the last step (cosine decay); null means a tenth of ``lr``.
        warmup_steps: Steps of linear warm-up; where the batch grows, full batches: both go by samples.
        precision: Arithmetic of forward and backward; ``fp8`` can be planned only.
        clip: Largest global gradient norm; 0 switches clipping off.
        beta1: Adam, decay of the first moment.
        beta2: Adam, decay of the second moment.
        eps: Adam, epsilon.
        weight_decay: AdamW decay.
        deterministic: Refuse kernels whose result depends on scheduling (matters on CUDA).
        spike_sigmas: A loss this many standard deviations above its running median is a blow-up: the run goes back to
            before it and leaves the step's samples out, once. 0: only what is not finite.
        eval_every: Steps between evaluations on what ``data.validation`` keeps from training; 0 for none.
        eval_batches: Global batches of one evaluation, as far as there are so many.
        skips: Samples that are never trained on, for example ``[{step: 100, samples: 512}]``: before step 100 the next
            512 are passed over.
        sample_tokens: Tokens of text generated from the final weights; 0 for none.
        sample_prompt: What the generated text continues.
        init_from: Weights to begin with instead of those that the seed draws: a Hugging Face folder, a run directory
            (its newest checkpoint), or a manifest. Null for none.
    """

    steps: int
    tokens: float | None = None
    global_batch: int
    ramp: Ramp | None = None
    seed: int = 0
    lr: float
    min_lr: float | None = None
    warmup_steps: int = 0
    precision: Precision
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    deterministic: bool = True
    spike_sigmas: float = 10.0
    eval_every: int = 0
    eval_batches: int = 4
    skips: tuple[Skip, ...] = ()
    sample_tokens: int = 0
    sample_prompt: str = "def "
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentConfig:
    """What a named run demands of itself.

    Attributes:
        require_faults: Submit fails (exit 100) unless the record shows that every injected fault happened and
            was noticed.
    """

    require_faults: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """What the planner assumes.

    Attributes:
        framework: Family of training code whose measured runs the predictions are calibrated on.
    """

    framework: Framework = "megatron"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are made, how many stay, and where.

    Attributes:
        every: Steps between checkpoints on disk; 0 leaves only the one after the last step. Null for the interval that
            the planner finds best for the plan on the cluster.
        memory_every: Steps between checkpoints in memory; 0 for none.
        keep: Number of newest committed checkpoints kept.
        url, patience_s: See :class:`jobs.spec.CheckpointSpec`.
    """

    every: int | None = 10
    memory_every: int = 0
    keep: int = 3
    url: str | None = None
    patience_s: float = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration, one field per group or section.

    Attributes:
        run: Where the run lives.
        model: The model.
        data: The text.
        cluster: The machine.
        strategy: The parallelism.
        train: The recipe.
        checkpoint: When checkpoints are made and how many stay.
        job: What the ranks do.
        recovery: When to give up, and how patient to be.
        tracking: Where metrics go besides ``metrics.jsonl``.
        experiment: What a named run demands of itself.
        planner: What the planner assumes.
        objective: What the best plan is best at: tokens per second that survive failures, seconds per step, dollars, or
            bytes per rank.
        faults: Faults to inject, for example ``node_kill@node=0,step=20``; ``random`` is drawn with ``fault_seed``.
        fault_seed: Seed of the random parts of ``faults``.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    cluster: ClusterConfig
    strategy: StrategyConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    job: JobConfig
    recovery: RecoverySpec
    tracking: TrackingSpec
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    objective: Literal["goodput", "time", "cost", "memory"] = "goodput"
    faults: tuple[str, ...] = ()
    fault_seed: int = 0


# Speeds that every description of hardware needs.
_BYTES_PER_S = ("memory", "intra", "inter", "host", "disk", "storage")
BANDWIDTHS = tuple(f"{what}_bandwidth" for what in _BYTES_PER_S)

# Smallest legal values. What depends on other values (divisibility, memory) is a rule of strategies.rules.
MINIMUM: dict[str, float] = {
    **{f"model.{key}": 1 for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "head_width")},
    "model.rope_scaling": 1,
    **{f"model.rope_stretch.{key}": 1 for key in ("factor", "original")},
    "model.rope_stretch.low": 0,
    **{f"model.{key}": 0 for key in ("norm_eps", "init_std", "rope_theta", "position_rows")},
    **{f"model.moe.{key}": 1 for key in ("experts", "top_k", "ffn", "imbalance")},
    **{
        f"model.moe.{key}": 0 for key in ("dense_layers", "shared_ffn", "capacity_factor", "balance_weight", "z_weight")
    },
    **{f"model.latent.{key}": 1 for key in ("kv_rank", "nope_width", "rope_width", "value_width")},
    "model.latent.q_rank": 0,
    **{f"cluster.{key}": 1 for key in ("nodes", "slots_per_node")},
    **{f"cluster.{key}": 0 for key in ("spares", "device_memory_bytes")},
    # Rates below these are mistakes of the unit: GB/s instead of bytes per second, TFLOP/s instead of operations.
    **{f"cluster.hardware.{key}": 1e9 for key in ("flops_fp32", "flops_16")},
    **{f"cluster.hardware.{key}": 1e6 for key in BANDWIDTHS},
    "cluster.hardware.processors": 1,
    **{f"cluster.hardware.{key}": 0 for key in FROM_ZERO},
    **{f"strategy.{key}": 1 for key in ("tp", "pp", "dp", "ep", "sp", "cp", "vpp", "micro_batch")},
    "strategy.zero_stage": 0,
    **{f"train.{key}": 1 for key in ("steps", "tokens", "global_batch", "eval_batches")},
    **{f"train.ramp.{key}": 0 for key in ("start", "increment", "samples", "tokens")},
    "data.validation": 0,
    "data.workers": 1,
    **{
        f"train.{key}": 0
        for key in (
            "seed",
            "lr",
            "min_lr",
            "warmup_steps",
            "clip",
            "beta1",
            "beta2",
            "eps",
            "weight_decay",
            "spike_sigmas",
            "eval_every",
            "sample_tokens",
        )
    },
    **{f"checkpoint.{key}": 0 for key in ("every", "memory_every", "patience_s")},
    "checkpoint.keep": 1,
    **{f"job.{key}": 1 for key in ("ship_limit_mb", "tokens")},
    **{f"job.{key}": 0 for key in ("shots", "temperature", "top_k")},
    "job.top_p": 1e-6,
    "recovery.max_restarts": 0,
    **{f"recovery.budgets.{field.name}": 0 for field in fields(Budgets)},
    **{f"recovery.{key}": 1 for key in ("same_error_limit", "min_nodes", "no_progress_limit", "exclude_after")},
    **{f"recovery.{key}": 0 for key in ("wait_for_nodes_s", "shrink_after_s", "grace_s", "backoff_s", "backoff_max_s")},
    **{f"recovery.{key}": 0 for key in ("exclude_window_s", "exclude_for_s", "preempt_grace_s", "kill_patience_s")},
    **{f"recovery.{key}": 0.1 for key in ("start_timeout_s", "save_timeout_s", "detect_s", "lease_s")},
    "recovery.budget_window_s": 1,
    "fault_seed": 0,
}
MAXIMUM: dict[str, float] = {
    "strategy.zero_stage": 3,
    "data.validation": 0.5,
    "job.top_p": 1,
    "train.beta1": 1,
    "train.beta2": 1,
    **{f"cluster.hardware.{key}": 1 for key in ("intra_latency_s", "inter_latency_s")},
    "cluster.hardware.failures_per_node_day": 100,  # one in a quarter of an hour, on every node: nothing runs there
}

# What helps with a value that is missing or out of bounds.
HINTS: dict[str, str] = {
    **{f"cluster.hardware.{key}": "Bytes per second in one direction; 25e9 is 200 Gb/s." for key in BANDWIDTHS},
    **{
        f"cluster.hardware.{key}": "Operations per second; 312e12 is 312 TFLOP/s." for key in ("flops_fp32", "flops_16")
    },
    **{
        f"cluster.hardware.{key}": "Seconds of one small message, for example 5e-6."
        for key in ("intra_latency_s", "inter_latency_s")
    },
    "cluster.hardware.failures_per_node_day": "Failures per node and day; Llama 3's 16,384 H100 had 0.004.",
    "cluster.hardware.processors": "Streaming multiprocessors, compute units or cores of one device; an A100 has 108.",
}

# The folders of conf/: `<group>=<choice>` picks a file. The other keys of Config are plain sections.
GROUPS = ("cluster", "data", "experiment", "job", "model", "recovery", "strategy", "tracking")
