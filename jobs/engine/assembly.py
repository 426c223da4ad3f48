"""The layers of a rank, cut as the plan says, in the DeepSpeed engine that trains them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec as PipeLayer
from deepspeed.pipe import PipelineModule
from deepspeed.pipe import TiedLayerSpec as PipeTiedLayer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import nn

from jobs.distributed import Grid
from jobs.engine.process import silence
from jobs.models.gpt import Decoder, LayerSpec, LossFunction, Recipe, layer_specs, stage_bounds
from jobs.parallel.meta import ParamMeta
from jobs.spec import JobSpec
from strategies.errors import PlanInfeasible, Violation
from strategies.plan import ParallelPlan


def refuse_modelled_only(plan: ParallelPlan) -> None:
    """The rules refuse such plans long before; this keeps one that slipped through from silently running another."""
    runnable = {"ep": 1, "sp": 1, "cp": 1, "vpp": 1, "schedule": "1f1b", "offload": "none"}
    broken = [
        Violation(rule="runnable", message=f"{field} is {getattr(plan, field)}", hint=f"only {value} can be run")
        for field, value in runnable.items()
        if getattr(plan, field) != value
    ]
    if broken:
        raise PlanInfeasible(broken)


class _Stages(PipelineModule):  # type: ignore[misc]  # deepspeed has no types
    """The layers of this rank's stage, cut where the plan says.

    The layers need DeepSpeed's process groups and DeepSpeed makes those in the constructor, just before it asks for
    the partition: so that is where the list of layers is made.
    """

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        plan = job.plan
        topology = PipeModelDataParallelTopology(num_pp=plan.pp, num_mp=plan.tp, num_dp=plan.dp)
        super().__init__(layers=[], topology=topology)
        self.loss_fn = LossFunction(job.model, self.grid, _loss_scale(job))

    def _partition_layers(self, method: str = "") -> None:
        job = self._job
        self.grid = _grid_of(self._grid)
        self._layer_specs = [_pipe_layer(spec) for spec in layer_specs(_recipe(job, self.grid))]
        self._num_layers = len(self._layer_specs)
        self.parts = stage_bounds(job.model, job.plan.stages)
        self._set_bounds(start=self.parts[self.grid.pipe], stop=self.parts[self.grid.pipe + 1])

    def _synchronize_tied_weights(self) -> None:
        with torch.no_grad():  # DeepSpeed writes into the parameters under autograd's eyes
            super()._synchronize_tied_weights()


def _pipe_layer(spec: LayerSpec) -> Any:
    if not spec.tied:
        return PipeLayer(spec.build, *spec.args)
    return PipeTiedLayer(spec.tied, spec.build, *spec.args, forward_fn=spec.run)


def assemble(job: JobSpec) -> tuple[Any, Grid]:
    """DeepSpeed's engine of this rank with the initial weights of the job, and the rank's place. Collective."""
    with silence():
        return (_pipelined if job.plan.pp > 1 else _unpipelined)(job)


def _pipelined(job: JobSpec) -> tuple[Any, Grid]:
    module = _Stages(job)
    grid: Grid = module.grid
    if not grid.first_stage:
        for parameter in module.tied_modules.parameters():
            _set_meta(parameter, dataclasses.replace(meta_of(parameter), primary=False))
    return _initialize(job, module, mpu=None), grid


def _unpipelined(job: JobSpec) -> tuple[Any, Grid]:
    plan = job.plan
    mpu = PipelineParallelGrid(PipeModelDataParallelTopology(num_pp=1, num_mp=plan.tp, num_dp=plan.dp))
    grid = _grid_of(mpu)
    module = Decoder(_recipe(job, grid), LossFunction(job.model, grid, _loss_scale(job)))
    return _initialize(job, module, mpu=mpu), grid


def grid_of(plan: ParallelPlan) -> Grid:
    """The rank's place under a plan, with DeepSpeed's groups but without an engine. Collective."""
    with silence():
        topology = PipeModelDataParallelTopology(num_pp=plan.pp, num_mp=plan.tp, num_dp=plan.dp)
        return _grid_of(PipelineParallelGrid(topology))


def _initialize(job: JobSpec, module: nn.Module, *, mpu: Any) -> Any:
    if job.train.precision == "fp32" and job.plan.zero_stage == 0:
        # This path of DeepSpeed (clip_grad_norm_) counts, beside what is marked, only the parameters of the very first
        # model-parallel rank: later stages would be left out. So here the mark means "counts on this rank".
        for parameter in module.parameters():
            parameter.tensor_model_parallel = meta_of(parameter).primary  # type: ignore[attr-defined]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    config = json.loads(json.dumps(dict(job.deepspeed)))  # DeepSpeed writes into it
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


def _recipe(job: JobSpec, grid: Grid) -> Recipe:
    return Recipe.of(job.model, grid, seed=job.train.seed, recompute=job.plan.recompute)


def _loss_scale(job: JobSpec) -> float:
    """DeepSpeed averages over micro-batches and replicas; this makes that average a mean over real tokens."""
    return job.plan.grad_accum * job.plan.dp / job.batch.tokens


def _grid_of(mpu: Any) -> Grid:
    """Our view of DeepSpeed's grid; axes of one rank get no group, so that nothing is communicated over them."""
    pp, dp, tp = mpu.pipe_parallel_size, mpu.data_parallel_size, mpu.model_parallel_size
    return Grid(
        pipe=mpu.get_stage_id(),
        data=mpu.get_data_parallel_id(),
        model=mpu.get_slice_parallel_rank(),
        pp=pp,
        dp=dp,
        tp=tp,
        pipe_group=mpu.get_pipe_parallel_group() if pp > 1 else None,
        data_group=mpu.get_data_parallel_group() if dp > 1 else None,
        model_group=mpu.get_slice_parallel_group() if tp > 1 else None,
    )


def meta_of(parameter: nn.Parameter) -> ParamMeta:
    meta: ParamMeta = parameter.phalanx  # type: ignore[attr-defined]
    return meta


def _set_meta(parameter: nn.Parameter, meta: ParamMeta) -> None:
    parameter.phalanx = meta  # type: ignore[attr-defined]
