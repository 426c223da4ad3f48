"""From a job to a DeepSpeed engine: the only module that imports deepspeed.

DeepSpeed does the pipeline schedule, ZeRO, mixed precision, clipping and the learning rate. What is ours: the layers,
which stage runs which, that the loss is an exact mean over the real tokens of the step under any plan, and marks on the
parameters without which DeepSpeed's gradient norm is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import encodings.idna  # noqa: F401
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed

# DeepSpeed and torch import these when an engine is built, which takes seconds. Here, a warm pool that imports this
# module pays for them once, and the ranks it forks start at once.
import deepspeed.comm.mori
import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.op_builder.all_ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.muon.original_muon
import torch
import torch._dynamo
import torch.distributed as dist
import torch.utils.cpp_extension
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec as PipeLayer
from deepspeed.pipe import PipelineModule
from deepspeed.pipe import TiedLayerSpec as PipeTiedLayer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.runtime.utils import clip_grad_norm_
from torch import nn

from jobs import distributed
from jobs.distributed import Grid
from jobs.models.gpt import Decoder, LayerSpec, LossFunction, Recipe, layer_specs, stage_bounds
from jobs.own_time import OwnTime
from jobs.parallel.meta import ParamMeta
from jobs.spec import JobSpec, RankEnv
from strategies.errors import PlanInfeasible, Violation
from strategies.plan import ParallelPlan

MicroBatch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step reports; equal on every rank.

    Attributes:
        loss: Mean cross entropy over the real tokens of the global batch, before the update.
        grad_norm: Global gradient norm before clipping; inf when the gradients are not finite.
        lr: Learning rate of this update.
        overflow: The update was left out because the fp16 loss scale was too large; that is normal.
    """

    loss: float
    grad_norm: float
    lr: float
    overflow: bool = False


class Engine:
    """One rank's share of the model, its optimizer and the DeepSpeed engine that trains them.

    Attributes:
        ds: DeepSpeed's engine: a ``PipelineEngine`` when the plan has stages, else a ``DeepSpeedEngine``.
        grid: This rank's place in the gang.
        plan: The plan.
        own_time: Sees what this rank waits for others.
    """

    def __init__(self, ds: Any, grid: Grid, plan: ParallelPlan, own_time: OwnTime) -> None:
        self.ds = ds
        self.grid = grid
        self.plan = plan
        self.own_time = own_time
        self._own_norm: torch.Tensor | None = None
        if _unwrapped_optimizer(ds):
            ds.clip_fp32_gradients = lambda: None  # done by the hook, which also keeps the norm
            ds.basic_optimizer.register_step_pre_hook(lambda *_: self._clip())

    @classmethod
    def build(cls, job: JobSpec, env: RankEnv) -> Engine:
        """Join the gang and build this rank's engine with the initial weights of the job. Collective.

        Raises:
            PlanInfeasible: The plan uses an axis or a schedule that is modelled only.
        """
        _refuse_modelled_only(job.plan)
        distributed.set_threads()
        _quiet()
        _make_deterministic(job.train.deterministic)
        accelerator = get_accelerator()
        accelerator.set_device(env.local_rank)
        # Compiled on first use, about a minute, and a rank killed meanwhile leaves a lock that hangs every later start
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # assigned: a look at the original probes ops
        os.environ["LOCAL_RANK"] = str(env.local_rank)  # DeepSpeed reads it in several places
        distributed.init_process_group(env, accelerator.communication_backend_name())
        immediate = accelerator.is_synchronized_device()
        own_time = OwnTime(None if immediate else lambda: accelerator.Event(enable_timing=True))
        own_time.install()  # before DeepSpeed looks the functions up
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology
            deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
            ds, grid = (_pipelined if job.plan.pp > 1 else _unpipelined)(job)
        return cls(ds, grid, job.plan, own_time)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device(self.ds.device)

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model."""
        module: nn.Module = self.ds.module
        return module

    @property
    def needs_data(self) -> bool:
        """Whether this rank looks at the batches it is given (the first stage embeds, the last has the loss)."""
        return self.grid.first_stage or self.grid.last_stage

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of everything this rank holds; each parameter carries ``.phalanx``."""
        for parameter in self.ds.module.parameters():
            yield parameter.phalanx.name, parameter

    def weights(self) -> Iterator[tuple[ParamMeta, torch.Tensor]]:
        """(place in the model, values as they are computed with) of everything this rank holds. Collective.

        Under ZeRO-3 the values of one parameter at a time are gathered from the replicas.
        """
        for parameter in self.ds.module.parameters():
            partitioned = self.plan.zero_stage == 3
            with deepspeed.zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext():
                yield _meta(parameter), parameter.detach().clone()

    def train_step(self, step: int, batches: Sequence[MicroBatch]) -> StepResult:
        """Run optimizer step ``step`` (from 1) on this replica's micro-batches. Collective.

        Args:
            step: Number of the step; decides the learning rate.
            batches: ``grad_accum`` pairs (tokens, targets), int64 ``[micro_batch, seq]`` each; targets are
                ``IGNORE`` where a row weighs nothing. Ranks of one replica get the same; ranks for which
                :attr:`needs_data` is false may get anything.

        Raises:
            ValueError: The number of micro-batches is not the plan's.
        """
        if len(batches) != self.plan.grad_accum:
            raise ValueError(f"step {step}: {len(batches)} micro-batches given, the plan has {self.plan.grad_accum}")
        self.set_position(step - 1)
        lr = float(self.ds.get_lr()[0])
        loss = self._train_pipelined(batches) if self.plan.pp > 1 else self._train_unpipelined(batches)
        return StepResult(loss=loss, grad_norm=self._grad_norm(), lr=lr, overflow=self._overflow())

    def set_position(self, step: int) -> None:
        """Make DeepSpeed's counters and the learning rate those of an engine that has done ``step`` steps."""
        self.ds.global_steps = step
        self.ds.global_samples = step * self.ds.train_batch_size()
        self.ds.micro_steps = step * self.plan.grad_accum
        self.ds.lr_scheduler.step(step + 1)  # its count is the number of the step to come, see deepspeed_config

    def close(self) -> None:
        """Leave the gang. The engine is of no use afterwards."""
        distributed.shutdown()

    def _train_pipelined(self, batches: Sequence[MicroBatch]) -> float:
        return float(self.ds.train_batch(iter(batches)))

    def _train_unpipelined(self, batches: Sequence[MicroBatch]) -> float:
        self.ds.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, targets in batches:
            loss = self.ds(tokens.to(self.device), targets.to(self.device))
            total += loss.detach()
            self.ds.backward(loss)
            self.ds.step()
        if self.grid.data_group is not None:
            dist.all_reduce(total, group=self.grid.data_group)
        return float(total) / (self.plan.grad_accum * self.plan.dp)

    def _grad_norm(self) -> float:
        norm = self.ds.get_global_grad_norm() if self._own_norm is None else self._own_norm
        value = float(norm)
        return value if math.isfinite(value) and value >= 0 else math.inf  # DeepSpeed says -1 for not finite

    def _overflow(self) -> bool:
        # DeepSpeed sets the flag without fp16, too; there is no loss scale then that could be to blame
        return bool(self.ds.fp16_enabled() and getattr(self.ds.optimizer, "overflow", False))

    def _clip(self) -> None:
        limit = self.ds.gradient_clipping() or math.inf
        self._own_norm = clip_grad_norm_(self.ds.module.parameters(), max_norm=limit, mpu=self.ds.mpu)


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


def _pipelined(job: JobSpec) -> tuple[Any, Grid]:
    module = _Stages(job)
    grid: Grid = module.grid
    if not grid.first_stage:
        for parameter in module.tied_modules.parameters():
            _set_meta(parameter, dataclasses.replace(_meta(parameter), primary=False))
    return _initialize(job, module, mpu=None), grid


def _unpipelined(job: JobSpec) -> tuple[Any, Grid]:
    plan = job.plan
    mpu = PipelineParallelGrid(PipeModelDataParallelTopology(num_pp=1, num_mp=plan.tp, num_dp=plan.dp))
    grid = _grid_of(mpu)
    module = Decoder(_recipe(job, grid), LossFunction(job.model, grid, _loss_scale(job)))
    return _initialize(job, module, mpu=mpu), grid


def _initialize(job: JobSpec, module: nn.Module, *, mpu: Any) -> Any:
    if job.train.precision == "fp32" and job.plan.zero_stage == 0:
        # This path of DeepSpeed (clip_grad_norm_) counts, beside what is marked, only the parameters of the very first
        # model-parallel rank: later stages would be left out. So here the mark means "counts on this rank".
        for parameter in module.parameters():
            parameter.tensor_model_parallel = _meta(parameter).primary  # type: ignore[attr-defined]
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


def _refuse_modelled_only(plan: ParallelPlan) -> None:
    """The rules refuse such plans long before; this keeps one that slipped through from silently running another."""
    runnable = {"ep": 1, "sp": 1, "cp": 1, "vpp": 1, "schedule": "1f1b", "offload": "none"}
    broken = [
        Violation(rule="runnable", message=f"{field} is {getattr(plan, field)}", hint=f"only {value} can be run")
        for field, value in runnable.items()
        if getattr(plan, field) != value
    ]
    if broken:
        raise PlanInfeasible(broken)


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


def _unwrapped_optimizer(ds: Any) -> bool:
    """Whether DeepSpeed steps torch's optimizer itself (fp32, ZeRO-0); it reports no gradient norm then."""
    return ds.optimizer is ds.basic_optimizer


def _meta(parameter: nn.Parameter) -> ParamMeta:
    meta: ParamMeta = parameter.phalanx  # type: ignore[attr-defined]
    return meta


def _set_meta(parameter: nn.Parameter, meta: ParamMeta) -> None:
    parameter.phalanx = meta  # type: ignore[attr-defined]


def _quiet() -> None:
    """Keep what DeepSpeed says about itself out of the rank logs, where people look for their own errors."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # of collectives that DeepSpeed calls, once per call
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)


def _make_deterministic(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # must be set before CUDA's first matmul
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a costly debugging aid
    torch.use_deterministic_algorithms(deterministic)
