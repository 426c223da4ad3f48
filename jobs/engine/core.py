"""What a rank trains with: a step, the weights, the norm of the gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.utils import clip_grad_norm_
from torch import nn

from jobs import disks, distributed
from jobs.build_time import BuildTime
from jobs.engine import assembly, async_io, process
from jobs.engine.norm import ExpertNorm, keep_precision
from jobs.models.packing import Documents
from jobs.own_time import OwnTime
from jobs.parallel.meta import ParamMeta
from jobs.parallel.router_log import RouterStats
from jobs.spec import JobSpec, RankEnv
from strategies.schedule import full_batches
from strategies.topology import Topology

MicroBatch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step reports; equal on every rank.

    Attributes:
        loss: Mean cross entropy over the real tokens of the global batch, before the update.
        grad_norm: Global gradient norm before clipping; inf when the gradients are not finite.
        lr: Learning rate of this update.
        overflow: The update was left out because the fp16 loss scale was too large; that is normal, unless it is as
            small as it may be: then this is false.
        moe: What the routers have done; None without experts. Their losses are in the gradient, not in ``loss``.
    """

    loss: float
    grad_norm: float
    lr: float
    overflow: bool = False
    moe: RouterStats | None = None


class Engine:
    """One rank's share of the model, its optimizer and the DeepSpeed engine that trains them.

    Attributes:
        ds: DeepSpeed's engine: a ``PipelineEngine`` when the plan has stages, else a ``DeepSpeedEngine``.
        grid: This rank's place in the gang.
        plan: The plan.
        own_time: Sees what this rank waits for others.
        router_log: Sees what routers do; None without experts.
        built: How many seconds it took to build it, by part (:mod:`jobs.build_time`).
    """

    def __init__(self, parts: assembly.Assembled, job: JobSpec, own_time: OwnTime) -> None:
        self.ds = ds = parts.ds
        self.grid = parts.grid
        self.plan = job.plan
        self._job = job
        self.own_time = own_time
        self.built: dict[str, float] = {}
        self.router_log = parts.router_log
        self._loss = parts.loss
        self._scale = getattr(ds.optimizer, "loss_scale_config", None)  # of the optimizer that reports scaled norms
        scaler: Any = getattr(ds.optimizer, "loss_scaler", self._scale)
        self._scaler = scaler
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # it is a blow-up, and found as one
        self._full = job.batch
        self._own_norm: torch.Tensor | None = None
        self._expert_norm = ExpertNorm(ds, self.grid) if self.plan.ep > 1 else None
        if self.plan.offload != "none":
            keep_precision(ds.optimizer)
        self._documents: Documents | None = getattr(ds.module, "documents", None)  # of a stage, not of a whole model
        if _unwrapped_optimizer(ds):
            ds.clip_fp32_gradients = lambda: None  # done by the hook, which also keeps the norm
            ds.basic_optimizer.register_step_pre_hook(lambda *_: self._clip())

    @classmethod
    def build(cls, job: JobSpec, env: RankEnv) -> Engine:
        """Join the gang and build this rank's engine with the initial weights of the job. Collective.

        Raises:
            ConfigError: State is to be kept on disks, and DeepSpeed's op for that is not compiled on this node.
            PlanInfeasible: The plan uses an axis or a schedule that is modelled only.
            StorageError: It cannot be kept there.
        """
        took = BuildTime()
        assembly.refuse_modelled_only(job.plan)
        if disks.on_disks(job.plan):
            async_io.load()
            job = disks.placed(job, env)
        own_time = process.join(env, deterministic=job.train.deterministic, took=took)
        with took.watching(lazy=process.connects_late()):
            engine = cls(assembly.assemble(job), job, own_time)
        engine.built = took.end()
        return engine

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
        """Whether this rank looks at the batches it is given: the first stage embeds, the last has the loss.

        Where documents are kept apart all do.
        """
        return self.grid.first_stage or self.grid.last_stage or self._documents is not None

    def fetchable(self, batch: MicroBatch) -> MicroBatch:
        """The same in memory from which the device can fetch it by itself, beside what it computes; from any thread."""
        if self.device.type == "cpu":
            return batch
        get_accelerator().set_device(self.device.index)  # a thread of its own begins on the first device
        tokens, targets = batch
        return tokens.pin_memory(), targets.pin_memory()

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
                yield assembly.meta_of(parameter), parameter.detach().clone()

    def train_step(self, step: int, batches: Sequence[MicroBatch], *, tokens: int | None = None) -> StepResult:
        """Run optimizer step ``step`` (from 1) on this replica's micro-batches. Collective.

        Args:
            step: Number of the step; decides the learning rate.
            batches: Pairs (tokens, targets), int64 ``[micro_batch, seq / sp]`` each, the same number on every rank;
                targets are ``IGNORE`` where a row weighs nothing. Ranks of one replica get the same rows, each its part
                (:meth:`Grid.tokens`); ranks for which :attr:`needs_data` is false may get anything.
            tokens: Real tokens of the step, over all replicas; None: those of the full batch.

        Raises:
            ValueError: There are fewer micro-batches than the schedule needs, or more than the plan has.
        """
        least, most = self.plan.least_accumulation, self.plan.grad_accum
        if not least <= len(batches) <= most:
            raise ValueError(f"step {step}: {len(batches)} micro-batches given, the plan takes {least} to {most}")
        self._accumulate(len(batches), tokens or self._full.tokens)
        self.set_position(step - 1)
        lr = float(self.ds.get_lr()[0])
        scale = float(self._scale.cur_scale) if self._scale is not None else 1.0
        lowest = self._scale_is_lowest()
        if self.router_log is not None and self.ds.fp16_enabled():
            self.router_log.loss_scale = float(self.ds.optimizer.loss_scale)
        loss = self._train_pipelined(batches) if self.plan.pp > 1 else self._train_unpipelined(batches)
        return StepResult(
            loss=loss,
            grad_norm=self._grad_norm() / scale,
            lr=lr,
            overflow=not lowest and self._overflow(),
            moe=None if self.router_log is None else self.router_log.take(self.grid),
        )

    def before_update(self, act: Callable[[], None]) -> None:
        """Do something in every step when gradients are complete, before ranks agree on their norm.

        So no rank can complete a step before every rank has done it. fp16 does it, too, where it leaves an update out.
        """
        update = self.ds._take_model_step  # of every DeepSpeed engine, with a pipeline and without

        def acted(*arguments: Any, **options: Any) -> None:
            act()
            update(*arguments, **options)

        self.ds._take_model_step = acted

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """Mean cross entropy of micro-batches as :meth:`train_step` takes them. Collective.

        No state of training changes. Where rows weigh nothing the mean is still over all tokens of a global batch.
        """
        self._accumulate(len(batches), self._full.tokens)
        if self.plan.pp > 1:
            return float(self.ds.eval_batch(self._micro_batches(batches)))
        self.ds.eval()
        with torch.no_grad():
            losses = (self.ds(*batch) for batch in self._on_device(batches))
            total = sum(losses, torch.zeros((), dtype=torch.float64, device=self.device))
        self.ds.train()
        return self._mean(total, len(batches))

    def set_position(self, step: int) -> None:
        """Make DeepSpeed's counters and the learning rate those of an engine that has done ``step`` steps."""
        self.ds.global_steps = step
        self.ds.global_samples = step * self.ds.train_batch_size()
        self.ds.micro_steps = step * self.ds.gradient_accumulation_steps()
        # Its count is the number of the step to come, see deepspeed_config.
        self.ds.lr_scheduler.step(full_batches(self._full, step + 1))

    def _accumulate(self, micro_batches: int, tokens: int) -> None:
        """DeepSpeed averages over micro-batches and replicas; make that average a mean over the step's real tokens."""
        replicas = Topology(self.plan).data_size
        if micro_batches != self.ds.gradient_accumulation_steps():
            self.ds.set_train_batch_size(self.plan.micro_batch * micro_batches * replicas)
        self._loss.scale = micro_batches * replicas / tokens
        if self.router_log is not None:  # whose losses are one number per sequence
            self.router_log.row_weight = self._full.seq * replicas / tokens

    def close(self) -> None:
        """Leave the gang. The engine is of no use afterwards."""
        distributed.shutdown()
        disks.clear(self._job)

    def _train_pipelined(self, batches: Sequence[MicroBatch]) -> float:
        return float(self.ds.train_batch(self._micro_batches(batches)))

    def _micro_batches(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Micro-batches for a pipeline, whose stages all have to know where documents end."""
        if self._documents is not None:
            self._documents.load((tokens for tokens, _ in batches), self.device)
        return self._on_device(batches)

    def _on_device(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """One after the other; what is :meth:`fetchable` keeps nobody waiting."""
        for tokens, targets in batches:
            yield tokens.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _train_unpipelined(self, batches: Sequence[MicroBatch]) -> float:
        self.ds.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self._on_device(batches):
            loss = self.ds(*batch)
            total += loss.detach()
            self.ds.backward(loss)
            self.ds.step()
        return self._mean(total, len(batches))

    def _mean(self, total: torch.Tensor, count: int) -> float:
        """Mean over ``count`` micro-batches and all replicas of a replica's sum."""
        if self.grid.data_group is not None:
            dist.all_reduce(total, group=self.grid.data_group)
        return float(total) / (count * Topology(self.plan).data_size)

    def _grad_norm(self) -> float:
        norm = self.ds.get_global_grad_norm() if self._own_norm is None else self._own_norm
        value = float(norm)
        return value if math.isfinite(value) and value >= 0 else math.inf  # DeepSpeed says -1 for not finite

    def _scale_is_lowest(self) -> bool:
        least = getattr(self._scaler, "min_scale", None) or getattr(self._scaler, "min_loss_scale", None)
        return least is not None and bool(self._scaler.cur_scale <= least)

    def _overflow(self) -> bool:
        # DeepSpeed sets the flag without fp16, too; there is no loss scale then that could be to blame
        return bool(self.ds.fp16_enabled() and getattr(self.ds.optimizer, "overflow", False))

    def _clip(self) -> None:
        limit = self.ds.gradient_clipping() or math.inf
        if self._expert_norm is not None:
            self._own_norm = self._expert_norm.clip(limit)
            return
        self._own_norm = clip_grad_norm_(self.ds.module.parameters(), max_norm=limit, mpu=self.ds.mpu)


def _unwrapped_optimizer(ds: Any) -> bool:
    """Whether DeepSpeed steps torch's optimizer itself (fp32, ZeRO-0); it reports no gradient norm then."""
    return ds.optimizer is ds.basic_optimizer
