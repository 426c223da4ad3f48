"""The layers of a rank, cut as the plan says, in the DeepSpeed engine that trains them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec as PipeLayer
from deepspeed.pipe import PipelineModule
from deepspeed.pipe import TiedLayerSpec as PipeTiedLayer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import nn

from jobs import disks
from jobs.distributed import Grid
from jobs.engine import experts
from jobs.engine.process import silence
from jobs.models.gpt import Decoder, LayerSpec, LossFunction, Recipe, layer_specs, stage_bounds
from jobs.models.packing import Documents
from jobs.parallel.meta import ParamMeta
from jobs.parallel.router_log import RouterLog
from jobs.spec import JobSpec
from strategies.errors import ConfigError, PlanInfeasible, Violation
from strategies.model_state import DTYPE_BYTES
from strategies.plan import ParallelPlan
from strategies.topology import Topology


def refuse_modelled_only(plan: ParallelPlan) -> None:
    """The rules refuse such plans long before; this keeps one that slipped through from silently running another."""
    one = (1,)
    runnable = {"cp": one, "vpp": one, "schedule": ("1f1b", "dualpipev")}
    broken = [
        Violation(
            rule="runnable",
            message=f"{field} is {getattr(plan, field)}",
            hint=f"only {' or '.join(str(value) for value in values)} can be run",
        )
        for field, values in runnable.items()
        if getattr(plan, field) not in values
    ]
    if broken:
        raise PlanInfeasible(broken)


class _Stages(PipelineModule):  # type: ignore[misc]  # deepspeed has no types
    """The layers of this rank's stage, cut where the plan says.

    The layers need DeepSpeed's process groups and DeepSpeed makes those in the constructor, just before it asks for
    the partition: so that is where the list of layers is made.
    """

    def __init__(self, job: JobSpec, log: RouterLog | None) -> None:
        self._job = job
        self._log = log
        super().__init__(layers=[], topology=_topology(job.plan))
        self.loss_fn = LossFunction(job.model, self.grid)

    def _partition_layers(self, method: str = "") -> None:
        self._cut(_grid_of(self._grid, self._job.plan))

    def _cut(self, grid: Grid) -> None:
        self.grid = grid
        self.documents = documents_of(self._job, grid)
        recipe = _recipe(self._job, grid, self.documents, self._log)
        self._layer_specs = [_pipe_layer(spec) for spec in layer_specs(recipe)]
        self._num_layers = len(self._layer_specs)
        self.parts = stage_bounds(self._job.model, self._job.plan.parts)
        self._set_bounds(start=self.parts[grid.pipe], stop=self.parts[grid.pipe + 1])

    def forward(self, inputs: Any) -> Any:
        if self.documents is not None:
            self.documents.begin(getattr(self, "active_phase", 0))
        return super().forward(inputs)

    def _synchronize_tied_weights(self) -> None:
        with torch.no_grad():  # DeepSpeed writes into the parameters under autograd's eyes
            super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list[tuple[Any, Any]]:
        """What DeepSpeed sums the ``grad`` of, over the stages that hold a copy of a tied weight.

        Its ZeRO-1 collects fp32 gradients of 16-bit weights (fp16, and bf16 with an offloaded optimizer) in
        ``grad_accum`` and leaves ``grad`` empty, which DeepSpeed takes for "there is none": each copy would be trained
        by its own stage's gradient alone, and a restore, which fills all copies from one, would change the model.
        """
        pairs = super().get_tied_weights_and_groups()
        sums = [getattr(weight, "grad_accum", None) for weight, _ in pairs]
        return [
            (weight if summed is None else SimpleNamespace(grad=summed), group)
            for (weight, group), summed in zip(pairs, sums, strict=True)
        ]


class _FoldedStages(_Stages, DualPipeVModule):  # type: ignore[misc]  # deepspeed has no types
    """The same for DualPipeV: this rank has two parts of the model, one on the way down and one on the way up."""

    def _partition_layers(self, method: str = "") -> None:
        self._cut(_grid_of(self._grid, self._job.plan))
        self.num_stages *= 2
        up = self.num_stages - 1 - self.stage_id
        self.phase_bounds = [(self._local_start, self._local_stop), (self.parts[up], self.parts[up + 1])]


def _pipe_layer(spec: LayerSpec) -> Any:
    if not spec.tied:
        return PipeLayer(spec.build, *spec.args)
    return PipeTiedLayer(spec.tied, spec.build, *spec.args, forward_fn=spec.run)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembled:
    """What a rank trains with.

    Attributes:
        ds: DeepSpeed's engine, with the initial weights of the job.
        grid: The rank's place.
        loss: What the engine applies to the logits.
        router_log: Sees what routers do; None without experts.
    """

    ds: Any
    grid: Grid
    loss: LossFunction
    router_log: RouterLog | None


def assemble(job: JobSpec) -> Assembled:
    """Everything of this rank. Collective.

    Raises:
        ConfigError: The device does not have the precision.
    """
    if job.train.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"This device ({get_accelerator().device_name()}) does not compute in fp16.",
            why="the accelerator says so (on CPUs oneDNN does, which wants avx512_fp16)",
            hint="train.precision=bf16",
        )
    log = None if job.model.moe is None else RouterLog(job.model, job.model.moe)
    with silence():
        return (_pipelined if job.plan.pp > 1 else _unpipelined)(job, log)


def _pipelined(job: JobSpec, log: RouterLog | None) -> Assembled:
    module = (_FoldedStages if job.plan.schedule == "dualpipev" else _Stages)(job, log)
    grid: Grid = module.grid
    if not grid.first_stage:
        for parameter in module.tied_modules.parameters():
            _set_meta(parameter, dataclasses.replace(meta_of(parameter), primary=False))
    return Assembled(ds=_initialize(job, module, mpu=None), grid=grid, loss=module.loss_fn, router_log=log)


def _unpipelined(job: JobSpec, log: RouterLog | None) -> Assembled:
    plan = job.plan
    mpu = PipelineParallelGrid(_topology(plan))
    grid = _grid_of(mpu, plan)
    loss = LossFunction(job.model, grid)
    ds = _initialize(job, Decoder(_recipe(job, grid, documents_of(job, grid), log), loss), mpu=mpu)
    return Assembled(ds=ds, grid=grid, loss=loss, router_log=log)


def grid_of(plan: ParallelPlan) -> Grid:
    """The rank's place under a plan, with DeepSpeed's groups but without an engine. Collective."""
    with silence():
        return _grid_of(PipelineParallelGrid(_topology(plan)), plan)


def _initialize(job: JobSpec, module: nn.Module, *, mpu: Any) -> Any:
    if job.train.precision == "fp32" and job.plan.zero_stage == 0:
        # This path of DeepSpeed (clip_grad_norm_) counts, beside what is marked, only the parameters of the very first
        # model-parallel rank: later stages would be left out. So here the mark means "counts on this rank".
        for parameter in module.parameters():
            parameter.tensor_model_parallel = meta_of(parameter).primary  # type: ignore[attr-defined]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if job.plan.ep > 1:
        experts.declare(module)
    config = json.loads(json.dumps(dict(job.deepspeed)))  # DeepSpeed writes into it
    ranks = Topology(job.plan).data_size
    shares = [-(-parameter.numel() // ranks) for parameter in parameters]
    disks.require_locked(disks.fit_buffers(config, shares, DTYPE_BYTES[job.train.precision]))
    ds, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config, mpu=mpu)
    if isinstance(ds.optimizer, FP16_UnfusedOptimizer):
        _undo_empty_step(ds.optimizer)
    return ds


def _undo_empty_step(optimizer: Any) -> None:
    """This optimizer allocates its state by a step without gradients; it decays the weights and Adam counts it."""
    for state in optimizer.optimizer.state.values():
        state["step"].zero_()
    for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            master.data.copy_(weight.data)


def documents_of(job: JobSpec, grid: Grid) -> Documents | None:
    """What keeps documents apart, if that is asked for."""
    return Documents(job.data.end_id, grid.seq_group) if job.data.packing else None


def _recipe(job: JobSpec, grid: Grid, documents: Documents | None, log: RouterLog | None) -> Recipe:
    return Recipe.of(
        job.model, grid, seed=job.train.seed, recompute=job.plan.recompute, documents=documents, router_log=log
    )


def _topology(plan: ParallelPlan) -> PipeModelDataParallelTopology:
    """DeepSpeed's axes: to it, the ranks of a sequence are replicas."""
    return PipeModelDataParallelTopology(num_pp=plan.pp, num_mp=plan.tp, num_dp=Topology(plan).data_size)


def _grid_of(mpu: Any, plan: ParallelPlan) -> Grid:
    """Our view of DeepSpeed's grid; axes of one rank get no group, so that nothing is communicated over them."""
    pp, ranks, tp = mpu.pipe_parallel_size, mpu.data_parallel_size, mpu.model_parallel_size
    replica, seq = divmod(mpu.get_data_parallel_id(), plan.sp)
    grid = Grid(
        pipe=mpu.get_stage_id(),
        data=replica,
        model=mpu.get_slice_parallel_rank(),
        seq=seq,
        pp=pp,
        dp=plan.dp,
        tp=tp,
        sp=plan.sp,
        pipe_group=mpu.get_pipe_parallel_group() if pp > 1 else None,
        data_group=mpu.get_data_parallel_group() if ranks > 1 else None,
        seq_group=_sequence_group(plan) if plan.sp > 1 else None,
        model_group=mpu.get_slice_parallel_group() if tp > 1 else None,
        split=plan.sequence_parallel and tp > 1,
        folded=plan.schedule == "dualpipev" and pp > 1,
    )
    return grid if plan.ep == 1 else experts.with_groups(grid, mpu, plan.ep)


def _sequence_group(plan: ParallelPlan) -> dist.ProcessGroup:
    """The ranks that share the sequences of this one. Collective."""
    topology = Topology(plan)
    groups = {topology.sp_group(rank): None for rank in range(topology.world_size)}
    mine, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups])  # type: ignore[no-untyped-call]
    return cast(dist.ProcessGroup, mine)


def meta_of(parameter: nn.Parameter) -> ParamMeta:
    meta: ParamMeta = parameter.phalanx  # type: ignore[attr-defined]
    return meta


def _set_meta(parameter: nn.Parameter, meta: ParamMeta) -> None:
    parameter.phalanx = meta  # type: ignore[attr-defined]
